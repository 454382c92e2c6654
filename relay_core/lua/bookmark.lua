#!lua flags=allow-oom
-- bookmark: keep the place of a bulk run, also when memory is full: a purge is what makes room
-- KEYS[1] b HASH bulk run -> how far it came
-- ARGV[1] bulk run | ARGV[2] how far it came
-- returns 1
-- moves: none | cost O(1)
local runs = KEYS[1]
local run, place = ARGV[1], ARGV[2]
redis.call('HSET', runs, run, place)
return 1
