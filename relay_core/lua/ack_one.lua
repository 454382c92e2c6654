#!lua flags=allow-oom
-- ack_one: one job is done and leaves the store, the short way: it never failed, its queue has no limits, it holds no dedup key
-- KEYS[1] o HASH id -> delivery state
-- KEYS[2] j HASH id -> record
-- KEYS[3] l ZSET id, score = lease deadline, unix ms
-- KEYS[4] f LIST ids finished lately
-- KEYS[5] s HASH counters
-- ARGV[1] id | ARGV[2] token
-- returns 1 done | 0 nothing was done, take the long way, which is ack
-- moves: inflight -> done | cost O(log inflight)
local owners, jobs, leases, finished, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local id, token = ARGV[1], ARGV[2]
-- 103 is 'g', see parts/claim
if string.byte(token, -1) == 103 or redis.call('HGET', owners, id) ~= token .. ' 0 h' then return 0 end
redis.call('HDEL', jobs, id)
redis.call('HDEL', owners, id)
redis.call('ZREM', leases, id)
local kept = redis.call('RPUSH', finished, id .. ' ' .. token)
--@include trim
return 1
