#!lua
-- requeue: dead jobs become ready again, with their retries and deliveries counted anew; each takes its dedup key where
--   that is free
-- KEYS[1] c HASH settings
-- KEYS[2] x ZSET id, score = time of death, unix ms
-- KEYS[3] j HASH id -> record
-- KEYS[4] o HASH id -> delivery state
-- KEYS[5] e HASH id -> last failure
-- KEYS[6] s HASH counters
-- KEYS[7] m ZSET wake marker
-- KEYS[8] u HASH dedup key -> id
-- KEYS[9] t ZSET dedup key, score = unix ms at which it is free
-- KEYS[10] g ZSET id, score = unix ms from which on anybody may tell of its burial
-- KEYS[11..20] r0..r9 LIST id, one per priority level
-- ARGV[1] layout version | ARGV[2..] at most 200 ids
-- returns answer per id: 1 requeued, 0 not dead
-- moves: dead -> ready | cost O(ids log dead)
local config, dead, jobs, owners, errors, counters, marker = unpack(KEYS, 1, 7)
local dedup, dedup_expiry, untold, ready = KEYS[8], KEYS[9], KEYS[10], {unpack(KEYS, 11, 20)}
local layout, ids = ARGV[1], {unpack(ARGV, 2)}
--@include clock
--@include record
--@include dedup
local found = redis.call('HGET', config, 'v')
--@include layout
local records = redis.call('HMGET', jobs, unpack(ids))
local answers, requeued = {}, 0
for i, id in ipairs(ids) do
  answers[i] = 0
  if records[i] and redis.call('ZREM', dead, id) == 1 then
    redis.call('HDEL', owners, id)
    redis.call('HDEL', errors, id)
    redis.call('ZREM', untold, id)
    redis.call('RPUSH', ready[parse_record(records[i]) + 1], id)
    local key = dedup_of(records[i])
    local free_at = key and redis.call('ZSCORE', dedup_expiry, key)
    if key and (free_at and tonumber(free_at) <= now or redis.call('HEXISTS', dedup, key) == 0) then
      redis.call('HSET', dedup, key, id)
      redis.call('ZREM', dedup_expiry, key)
    end
    answers[i] = 1
    requeued = requeued + 1
  end
end
if requeued > 0 then
  redis.call('HINCRBY', counters, 'requeued', requeued)
  redis.call('ZADD', marker, 0, 'w')
end
return answers
