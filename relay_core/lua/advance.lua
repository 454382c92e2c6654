#!lua flags=allow-oom
-- advance: a schedule waits for its next tick, if neither its plan nor its tick was changed meanwhile
-- KEYS[1] p HASH schedule -> plan
-- KEYS[2] n ZSET schedule, score = its next tick, unix ms
-- ARGV[1] schedule | ARGV[2] the plan that the caller saw | ARGV[3] the tick that is done, unix ms
-- ARGV[4] the next tick, unix ms
-- returns 1 it waits, 0 somebody else was here
-- moves: none | cost O(log schedules)
local plans, next_ticks = unpack(KEYS, 1, 2)
local schedule, plan, done, moment = unpack(ARGV, 1, 4)
local tick = redis.call('ZSCORE', next_ticks, schedule)
if tonumber(tick or nil) ~= tonumber(done) or (redis.call('HGET', plans, schedule) or '') ~= plan then return 0 end
redis.call('ZADD', next_ticks, moment, schedule)
return 1
