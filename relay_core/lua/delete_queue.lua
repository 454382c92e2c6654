#!lua flags=allow-oom
-- delete_queue: drop what is left of a queue partition that holds no job: settings, counters, receipts, dedup keys
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] d ZSET id, score = due time, unix ms
-- KEYS[4] l ZSET id, score = lease deadline, unix ms
-- KEYS[5] x ZSET id, score = time of death, unix ms
-- KEYS[6] o HASH id -> delivery state
-- KEYS[7] e HASH id -> last failure
-- KEYS[8] u HASH dedup key -> id
-- KEYS[9] t ZSET dedup key, score = unix ms at which it is free
-- KEYS[10] m ZSET wake marker
-- KEYS[11] s HASH counters
-- KEYS[12] f LIST ids finished lately
-- KEYS[13] b HASH what a bulk command does -> how far it came
-- KEYS[14] k ZSET schedule, score = its last tick, unix ms
-- KEYS[15] g ZSET id, score = unix ms from which on anybody may tell of its burial
-- KEYS[16..25] r0..r9 LIST id, one per priority level
-- KEYS[26] y HASH id -> payload, of jobs whose record says that it lies apart
-- ARGV[1] layout version
-- returns 1 it is gone | 0 jobs keep it
-- moves: none | cost O(receipts + dedup keys)
local config, jobs = KEYS[1], KEYS[2]
local layout = ARGV[1]
local found = redis.call('HGET', config, 'v')
--@include layout
if redis.call('EXISTS', jobs) == 1 then return 0 end
redis.call('DEL', unpack(KEYS, 1, 26))
return 1
