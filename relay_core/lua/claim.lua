#!lua flags=allow-oom
-- claim: lease ready jobs of one queue partition, after promoting and reaping a bounded few
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
-- KEYS[12..21] r0..r9 LIST id, one per priority level
-- ARGV[1] layout version | ARGV[2] 1 when an earlier send may have run | ARGV[3] count, 1..200
-- ARGV[4] lease, ms | ARGV[5] nonce | ARGV[6] max deliveries of jobs that name none
-- ARGV[7] how long dead jobs are kept, ms | ARGV[8] 1 when the caller took the wake marker
-- returns {status, hint ms, now, promoted, reaped, buried rows, id, token, retries, record, ...}; see parts/claim
-- moves: ready -> inflight | delayed -> ready | inflight -> ready | inflight, ready -> dead | cost O(count log inflight)
local config, jobs, counters, marker = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local delayed, leases, dead, owners, errors = KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local dedup, dedup_expiry = KEYS[10], KEYS[11]
local READY = 12 -- the ready list of level n is KEYS[READY + n]
local layout, resent, want, lease_ms, nonce = ARGV[1], ARGV[2] == '1', tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local max_deliveries, keep_ms, woken = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8] == '1'
--@include clock
--@include claim
return reply
