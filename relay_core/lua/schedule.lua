#!lua
-- schedule: store the plan of a schedule, if it still is as the caller saw it
-- KEYS[1] p HASH schedule -> plan
-- KEYS[2] n ZSET schedule, score = its next tick, unix ms
-- KEYS[3] a ZSET wake marker of those who run schedules
-- ARGV[1] schedule | ARGV[2] the plan that the caller saw, '' for none | ARGV[3] the new plan
-- ARGV[4] its next tick, unix ms
-- returns {now, 1 stored, 0 the plan is another one}
-- moves: none | cost O(log schedules)
local plans, next_ticks, alarm = unpack(KEYS, 1, 3)
local schedule, seen, plan, moment = unpack(ARGV, 1, 4)
--@include clock
local stored = redis.call('HGET', plans, schedule) or ''
if stored ~= seen and stored ~= plan then return {now, 0} end
redis.call('HSET', plans, schedule, plan)
redis.call('ZADD', next_ticks, moment, schedule)
redis.call('ZADD', alarm, 0, 'w')
return {now, 1}
