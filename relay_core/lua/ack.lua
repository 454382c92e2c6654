#!lua flags=allow-oom
-- ack: jobs are done and leave the store
-- KEYS[1] o HASH id -> delivery state
-- KEYS[2] j HASH id -> record
-- KEYS[3] l ZSET id, score = lease deadline, unix ms
-- KEYS[4] e HASH id -> last failure
-- KEYS[5] u HASH dedup key -> id
-- KEYS[6] f LIST ids finished lately
-- KEYS[7] s HASH counters
-- KEYS[8] m ZSET wake marker
-- KEYS[9] y HASH id -> payload, of jobs whose record says that it lies apart
-- ARGV[1..] three per job, at most 200 jobs: id | token | dedup key held until done, or ''
-- returns answer per job: 1 done, 2 already done by this token, 0 lease lost
-- moves: inflight -> done | cost O(jobs log inflight)
local owners, jobs, leases, errors, dedup = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local finished, counters, marker, payloads = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
--@include ack
return ack(1, #ARGV / 3)
