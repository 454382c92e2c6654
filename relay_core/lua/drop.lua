#!lua flags=allow-oom
-- drop: dead jobs leave the store for good; what is not dead any more is left alone
-- KEYS[1] c HASH settings
-- KEYS[2] x ZSET id, score = time of death, unix ms
-- KEYS[3] j HASH id -> record
-- KEYS[4] o HASH id -> delivery state
-- KEYS[5] e HASH id -> last failure
-- KEYS[6] s HASH counters
-- KEYS[7] g ZSET id, score = unix ms from which on anybody may tell of its burial
-- KEYS[8] y HASH id -> payload, of jobs whose record says that it lies apart
-- ARGV[1] layout version | ARGV[2..] at most 200 ids
-- returns answer per id: 1 dropped, 0 not dead
-- moves: dead -> none | cost O(ids log dead)
local config, dead, jobs, owners, errors, counters, untold, payloads = unpack(KEYS, 1, 8)
local layout, ids = ARGV[1], {unpack(ARGV, 2)}
local found = redis.call('HGET', config, 'v')
--@include layout
local answers, dropped = {}, 0
for i, id in ipairs(ids) do
  answers[i] = redis.call('ZREM', dead, id)
  if answers[i] == 1 then
    redis.call('HDEL', owners, id)
    redis.call('HDEL', errors, id)
    redis.call('ZREM', untold, id)
    redis.call('HDEL', payloads, id)
    dropped = dropped + redis.call('HDEL', jobs, id)
  end
end
if dropped > 0 then redis.call('HINCRBY', counters, 'purged', dropped) end
return answers
