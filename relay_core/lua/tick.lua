#!lua
-- tick: store the job of one tick of a schedule, unless that tick or a later one was here before
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] s HASH counters
-- KEYS[4] m ZSET wake marker
-- KEYS[5] u HASH dedup key -> id
-- KEYS[6] k ZSET schedule, score = its last tick, unix ms
-- KEYS[7..16] r0..r9 LIST id, one per priority level
-- ARGV[1] layout version | ARGV[2] schedule | ARGV[3] the tick, unix ms | ARGV[4] id of its job
-- ARGV[5] dedup key that the job holds until it is done, or ''
-- ARGV[6] record without its creation time; its first byte is the level
-- returns 1 stored, 0 the tick was here before, else id of the job that holds the dedup key: the tick is passed over
-- moves: none -> ready | cost O(log schedules)
local config, jobs, counters, marker, dedup, ticks = unpack(KEYS, 1, 6)
local READY = 7 -- the ready list of level n is KEYS[READY + n]
local layout, schedule, moment, id, key, record = unpack(ARGV, 1, 6)
local FORGOTTEN = 400 * 86400000 -- ms after the last tick of a schedule that is gone
--@include clock
local set = redis.call('HMGET', config, 'v', 'levels')
local found, levels = set[1], set[2] or ''
--@include layout
local last = redis.call('ZSCORE', ticks, schedule)
if last and tonumber(last) >= tonumber(moment) then
  redis.call('HSET', config, 'v', layout) -- WAIT and WAITAOF confirm the last write of their connection
  return 0
end
redis.call('ZADD', ticks, moment, schedule)
redis.call('ZREMRANGEBYSCORE', ticks, '-inf', now - FORGOTTEN)
local holder = key ~= '' and redis.call('HGET', dedup, key)
if holder then
  redis.call('HINCRBY', counters, 'deduplicated', 1)
  return holder
end
if redis.call('HSETNX', jobs, id, now .. ' ' .. record) == 0 then return 0 end
local level = string.sub(record, 1, 1)
redis.call('RPUSH', KEYS[READY + level], id)
if key ~= '' then redis.call('HSET', dedup, key, id) end
if not string.find(levels, level, 1, true) then
  -- digits of the levels in use, highest first, the order in which claims look
  local sorted = ''
  for digit = 9, 0, -1 do
    if digit == tonumber(level) or string.find(levels, digit, 1, true) then sorted = sorted .. digit end
  end
  redis.call('HSET', config, 'v', layout, 'levels', sorted)
end
redis.call('ZADD', marker, 0, 'w')
return 1
