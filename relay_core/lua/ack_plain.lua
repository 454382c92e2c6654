#!lua flags=allow-oom
-- ack_plain: jobs are done and leave the store, the short way: they never failed, their queue has no limits, none holds
--   a dedup key or has its payload apart
-- KEYS[1] o HASH id -> delivery state
-- KEYS[2] j HASH id -> record
-- KEYS[3] l ZSET id, score = lease deadline, unix ms
-- KEYS[4] f LIST ids finished lately
-- KEYS[5] s HASH counters
-- ARGV[1..] two per job, at most 200 jobs, each once: the delivery states that they must have, then the ids
-- returns 1 all are done | 0 nothing was done, take the long way, which is ack
-- moves: inflight -> done | cost O(jobs log inflight)
local owners, jobs, leases, finished, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local args, ids_from, ids_to, items_from = ARGV, #ARGV / 2 + 1, #ARGV, 1
local byte = string.byte
local states = redis.call('HMGET', owners, unpack(args, ids_from, ids_to))
for n = 1, #states do
  local held = args[n]
  -- 103 is 'g', see parts/claim
  if states[n] ~= held or byte(held, -5) == 103 then return 0 end
end
--@include done
return 1
