#!lua flags=allow-oom
-- unschedule: remove a schedule
-- KEYS[1] p HASH schedule -> plan
-- KEYS[2] n ZSET schedule, score = its next tick, unix ms
-- ARGV[1] schedule
-- returns {now, its plan or ''}
-- moves: none | cost O(log schedules)
local plans, next_ticks = unpack(KEYS, 1, 2)
local schedule = ARGV[1]
--@include clock
local plan = redis.call('HGET', plans, schedule) or ''
redis.call('HDEL', plans, schedule)
redis.call('ZREM', next_ticks, schedule)
return {now, plan}
