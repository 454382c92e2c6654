#!lua flags=allow-oom
-- nack: jobs failed; each waits for its retry, or goes to dead when its retries are used up
-- KEYS[1] o HASH id -> delivery state
-- KEYS[2] j HASH id -> record
-- KEYS[3] l ZSET id, score = lease deadline, unix ms
-- KEYS[4] e HASH id -> last failure
-- KEYS[5] u HASH dedup key -> id
-- KEYS[6] d ZSET id, score = due time, unix ms
-- KEYS[7] s HASH counters
-- KEYS[8] c HASH settings
-- KEYS[9] m ZSET wake marker
-- KEYS[10] x ZSET id, score = time of death, unix ms
-- KEYS[11..20] r0..r9 LIST id, one per priority level
-- KEYS[21] y HASH id -> payload, of jobs whose record says that it lies apart
-- ARGV[1..] seven per job, at most 200 jobs: id | token | delay ms, -1 dead now | max retries | reason | error |
--   record without its creation time, or '' to keep the old one
-- returns answer per job: 1 retried, 2 dead, 3 already nacked by this token, 4 the same, and dead since, 0 lease lost
-- moves: inflight -> delayed, ready, dead | cost O(jobs log delayed)
local owners, jobs, leases, errors, dedup = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local delayed, counters, config, marker, dead = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local payloads = KEYS[21]
local READY = 11 -- the ready list of level n is KEYS[READY + n]
local count = #ARGV / 7
--@include clock
--@include owner
--@include record
--@include dedup
--@include bury
--@include nack
return nack(1, count)
