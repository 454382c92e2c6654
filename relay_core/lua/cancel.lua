#!lua flags=allow-oom
-- cancel: take jobs that are not running out of the store
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] d ZSET id, score = due time, unix ms
-- KEYS[4] l ZSET id, score = lease deadline, unix ms
-- KEYS[5] x ZSET id, score = time of death, unix ms
-- KEYS[6] o HASH id -> delivery state
-- KEYS[7] e HASH id -> last failure
-- KEYS[8] u HASH dedup key -> id
-- KEYS[9] s HASH counters
-- KEYS[10] g ZSET id, score = unix ms from which on anybody may tell of its burial
-- KEYS[11..20] r0..r9 LIST id, one per priority level
-- KEYS[21] y HASH id -> payload, of jobs whose record says that it lies apart
-- ARGV[1] layout version | ARGV[2..] at most 200 ids
-- returns state per id as it was found: ready, delayed, dead: gone now; inflight: left alone; '': no such job
-- moves: ready, delayed, dead -> none | cost O(log delayed) per delayed or dead id, O(ready) per ready one
local config, jobs, delayed, leases, dead, owners, errors, dedup, counters, untold = unpack(KEYS, 1, 10)
local ready, payloads = {unpack(KEYS, 11, 20)}, KEYS[21]
local layout, ids = ARGV[1], {unpack(ARGV, 2)}
--@include record
--@include dedup
local found = redis.call('HGET', config, 'v')
--@include layout
local answers, cancelled = {}, 0
for i, id in ipairs(ids) do
  local record = redis.call('HGET', jobs, id)
  local state = ''
  if record then
    if redis.call('ZSCORE', leases, id) then state = 'inflight'
    elseif redis.call('ZREM', delayed, id) == 1 then state = 'delayed'
    elseif redis.call('ZREM', dead, id) == 1 then state = 'dead'
    elseif redis.call('LREM', ready[parse_record(record) + 1], 1, id) == 1 then state = 'ready'
    end
    if state ~= '' and state ~= 'inflight' then
      redis.call('HDEL', jobs, id)
      redis.call('HDEL', payloads, id)
      redis.call('HDEL', owners, id)
      redis.call('HDEL', errors, id)
      if state == 'dead' then redis.call('ZREM', untold, id) end
      free_dedup_of(id, record)
      cancelled = cancelled + 1
    end
  end
  answers[i] = state
end
if cancelled > 0 then redis.call('HINCRBY', counters, 'cancelled', cancelled) end
return answers
