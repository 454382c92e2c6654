#!lua flags=allow-oom
-- reap: jobs whose lease expired become ready again, or dead past max deliveries; old dead jobs are dropped
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] s HASH counters
-- KEYS[4] m ZSET wake marker
-- KEYS[5] d ZSET id, score = due time, unix ms
-- KEYS[6] l ZSET id, score = lease deadline, unix ms
-- KEYS[7] x ZSET id, score = time of death, unix ms
-- KEYS[8] o HASH id -> delivery state
-- KEYS[9] e HASH id -> last failure
-- KEYS[10] u HASH dedup key -> id
-- KEYS[11] t ZSET dedup key, score = unix ms at which it is free
-- KEYS[12] g ZSET id, score = unix ms from which on anybody may tell of its burial
-- KEYS[13..22] r0..r9 LIST id, one per priority level
-- KEYS[23] y HASH id -> payload, of jobs whose record says that it lies apart
-- ARGV[1] layout version | ARGV[2] most jobs to reap, 1..200 | ARGV[3] max deliveries of jobs that name none
-- ARGV[4] how long dead jobs are kept, ms
-- returns {now, reaped, buried rows {id, token, retries, record, ...}, dead jobs dropped, number of burials to retell}
-- moves: inflight -> ready, dead | dead -> none | cost O(reaped log inflight)
local config, jobs, counters, marker = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local delayed, leases, dead, owners, errors = KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local dedup, dedup_expiry, untold, payloads = KEYS[10], KEYS[11], KEYS[12], KEYS[23]
local READY = 13 -- the ready list of level n is KEYS[READY + n]
local layout, limit, max_deliveries, keep_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
--@include clock
--@include owner
--@include record
--@include whole
--@include dedup
--@include bury
--@include sweep
local found = redis.call('HGET', config, 'v')
--@include layout
local gone = {}
local reaped = reap(limit, max_deliveries, gone)
local dropped, more = forget(limit, keep_ms)
if reaped > 0 then redis.call('ZADD', marker, 0, 'w') end
set_due(more)
return {now, reaped, gone, dropped, redis.call('ZCOUNT', untold, '-inf', now)}
