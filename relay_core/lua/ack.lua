#!lua flags=allow-oom
-- ack: jobs are done and leave the store
-- KEYS[1] o HASH id -> delivery state
-- KEYS[2] j HASH id -> record
-- KEYS[3] l ZSET id, score = lease deadline, unix ms
-- KEYS[4] e HASH id -> last failure
-- KEYS[5] u HASH dedup key -> id
-- KEYS[6] f LIST ids finished lately
-- KEYS[7] s HASH counters
-- KEYS[8] m ZSET wake marker
-- ARGV[1..] three per job, at most 200 jobs: id | token | dedup key held until done, or ''
-- returns answer per job: 1 done, 2 already done by this token, 0 lease lost
-- moves: inflight -> done | cost O(jobs log inflight)
local owners, jobs, leases, errors, dedup = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local finished, counters, marker = KEYS[6], KEYS[7], KEYS[8]
local args, count = ARGV, #ARGV / 3
local id, token = args[1], args[2]
if count == 1 and redis.call('HGET', owners, id) == token .. ' 0 h' and args[3] == '' and string.byte(token, -1) ~= 103 then
  -- one plain job, the commonest call, without the tables that the others need; 103 is 'g', see parts/claim
  local kept = redis.call('RPUSH', finished, id .. ' ' .. token)
  if kept <= 11000 then
    redis.call('HDEL', jobs, id)
    redis.call('HDEL', owners, id)
    redis.call('ZREM', leases, id)
    return {1}
  end
  redis.call('RPOP', finished)
end
--@include ack
return ack(1, count)
