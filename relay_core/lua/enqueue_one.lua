#!lua
-- enqueue_one: store one job of one queue partition, the short way: ready now, no dedup key, its level in use before
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] m ZSET wake marker
-- KEYS[4] LIST id, the ready list of the job's level
-- ARGV[1] layout version | ARGV[2] 0, or ms since an earlier send that may have run
-- ARGV[3] id | ARGV[4] record without its creation time; its first byte is the level
-- returns the server's time, unix ms: stored | 0 nothing was done, take the long way, which is enqueue
-- moves: none -> ready | cost O(1)
local config, jobs, marker, ready = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local layout, resent, id, record = ARGV[1], ARGV[2] ~= '0', ARGV[3], ARGV[4]
--@include clock
local set = redis.call('HMGET', config, 'v', 'levels')
local found, levels = set[1], set[2]
--@include layout
if resent or not levels or not string.find(levels, string.sub(record, 1, 1), 1, true) then return 0 end
if redis.call('HSETNX', jobs, id, string.format('%d ', now) .. record) == 0 then return 0 end
redis.call('RPUSH', ready, id)
redis.call('ZADD', marker, '0', 'w')
return now
