#!lua flags=allow-oom
-- finish: ack and nack what a worker is done with and claim more, in one round trip
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
-- KEYS[24] f LIST ids finished lately
-- ARGV[1] layout version | ARGV[2] 0, or ms since an earlier send that may have run | ARGV[3] count to claim, 0..200
-- ARGV[4] lease, ms | ARGV[5] nonce | ARGV[6] max deliveries of jobs that name none
-- ARGV[7] how long dead jobs are kept, ms | ARGV[8] 1 when the caller took the wake marker
-- ARGV[9] number of acks, 0..200 | ARGV[10] number of nacks, 0..200
-- ARGV[11..] three per ack: id | token | dedup key or '';
--   then seven per nack: id | token | delay ms, -1 dead now | max retries | reason | error | new record or ''
-- returns {answers of the acks, answers of the nacks, reply as of claim, number of burials to retell}; see parts/ack,
--   parts/nack, parts/claim
-- moves: inflight -> done | inflight -> delayed, ready, dead | and those of claim
--   cost O((acks + nacks + count) log inflight)
local config, jobs, counters, marker = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local delayed, leases, dead, owners, errors = KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local dedup, dedup_expiry, untold, payloads = KEYS[10], KEYS[11], KEYS[12], KEYS[23]
local READY = 13 -- the ready list of level n is KEYS[READY + n]
local finished = KEYS[24]
local layout, resent, want, lease_ms, nonce = ARGV[1], ARGV[2] ~= '0', tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local max_deliveries, keep_ms, woken = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8] == '1'
local acks, nacks, items_from = tonumber(ARGV[9]), tonumber(ARGV[10]), 11
--@include clock
local acked, nacked = {}, {}
do
  -- what cannot be claimed must not be ended either: the caller would take all for refused
  local found = redis.call('HGET', config, 'v')
  --@include layout
end
if acks > 0 then
  --@include ack
  acked = ack(items_from, acks)
end
if nacks > 0 then
  --@include owner
  --@include record
  --@include dedup
  --@include bury
  --@include nack
  nacked = nack(items_from + 3 * acks, nacks)
end
--@include claim
return {acked, nacked, reply, redis.call('ZCOUNT', untold, '-inf', now)}
