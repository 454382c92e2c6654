#!lua flags=allow-oom
-- retire: no tick of a schedule up to a moment is taken by a queue any more, as if it had been here before
-- KEYS[1] k ZSET schedule, score = its last tick, unix ms
-- ARGV[1] schedule | ARGV[2] the moment, unix ms
-- returns 1
-- moves: none | cost O(log schedules)
local ticks = KEYS[1]
local schedule, moment = ARGV[1], ARGV[2]
redis.call('ZADD', ticks, 'GT', moment, schedule)
return 1
