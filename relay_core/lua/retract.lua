#!lua flags=allow-oom
-- retract: a job that plain commands have stored in a queue which refuses it leaves the store again, unless it was taken
-- KEYS[1] j HASH id -> record
-- KEYS[2] y HASH id -> payload, of jobs whose record says that it lies apart
-- KEYS[3] LIST id, the ready list of the job's level
-- ARGV[1] id
-- returns 1 it is gone | 0 it does not wait any more
-- moves: ready -> none | cost O(jobs that came after it)
local jobs, payloads, ready, id = KEYS[1], KEYS[2], KEYS[3], ARGV[1]
if redis.call('LREM', ready, -1, id) == 0 then return 0 end
redis.call('HDEL', jobs, id)
redis.call('HDEL', payloads, id)
return 1
