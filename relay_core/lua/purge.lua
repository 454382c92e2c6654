#!lua flags=allow-oom
-- purge: drop a bounded number of the ready, delayed or dead jobs, the oldest first
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] d ZSET id, score = due time, unix ms
-- KEYS[4] x ZSET id, score = time of death, unix ms
-- KEYS[5] o HASH id -> delivery state
-- KEYS[6] e HASH id -> last failure
-- KEYS[7] u HASH dedup key -> id
-- KEYS[8] s HASH counters
-- KEYS[9] g ZSET id, score = unix ms from which on anybody may tell of its burial
-- KEYS[10..19] r0..r9 LIST id, one per priority level
-- KEYS[20] y HASH id -> payload, of jobs whose record says that it lies apart
-- KEYS[21] l ZSET id, score = lease deadline, unix ms
-- ARGV[1] layout version | ARGV[2] state: ready, delayed or dead | ARGV[3] most jobs to drop, 1..200
-- ARGV[4] how many ready jobs to leave
-- returns number of jobs dropped
-- moves: ready, delayed, dead -> none | cost O(dropped log state)
local config, jobs, delayed, dead, owners, errors, dedup, counters, untold = unpack(KEYS, 1, 9)
local ready, payloads, leases = {unpack(KEYS, 10, 19)}, KEYS[20], KEYS[21]
local layout, state, limit, keep = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
--@include dedup
--@include elsewhere
local found = redis.call('HGET', config, 'v')
--@include layout
local ids = {}
if state == 'ready' then
  if keep > 0 then
    local there = 0
    for level = 1, 10 do there = there + redis.call('LLEN', ready[level]) end
    limit = math.min(limit, there - keep)
  end
  local popped = {}
  for level = 10, 1, -1 do
    for _, id in ipairs(#popped < limit and redis.call('LPOP', ready[level], limit - #popped) or {}) do
      popped[#popped + 1] = id
    end
  end
  for i, state_of in ipairs(#popped > 0 and redis.call('HMGET', owners, unpack(popped)) or {}) do
    if not (state_of and elsewhere(popped[i])) then ids[#ids + 1] = popped[i] end
  end
else
  local popped = redis.call('ZPOPMIN', state == 'dead' and dead or delayed, limit)
  for i = 1, #popped, 2 do ids[#ids + 1] = popped[i] end
end
if #ids == 0 then return 0 end
for i, record in ipairs(redis.call('HMGET', jobs, unpack(ids))) do free_dedup_of(ids[i], record) end
redis.call('HDEL', jobs, unpack(ids))
redis.call('HDEL', payloads, unpack(ids))
redis.call('HDEL', owners, unpack(ids))
redis.call('HDEL', errors, unpack(ids))
if state == 'dead' then redis.call('ZREM', untold, unpack(ids)) end
redis.call('HINCRBY', counters, 'purged', #ids)
return #ids
