#!lua flags=allow-oom,no-writes
-- list: one page of the jobs in a state, for people and tools
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] d ZSET id, score = due time, unix ms
-- KEYS[4] l ZSET id, score = lease deadline, unix ms
-- KEYS[5] x ZSET id, score = time of death, unix ms
-- KEYS[6] o HASH id -> delivery state
-- KEYS[7] e HASH id -> last failure
-- KEYS[8..17] r0..r9 LIST id, one per priority level
-- KEYS[18] y HASH id -> payload, of jobs whose record says that it lies apart
-- ARGV[1] layout version | ARGV[2] state | ARGV[3] jobs to pass over | ARGV[4] most jobs to return, 1..200
-- returns {id, state, score or -1, record or '', delivery state or '', last failure or '', ...}, six per job
-- moves: none | cost O(passed over + returned)
local config, jobs, delayed, leases, dead, owners, errors = unpack(KEYS, 1, 7)
local ready, payloads = {unpack(KEYS, 8, 17)}, KEYS[18]
local layout, state, skip, limit = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
--@include whole
--@include rows
local found = redis.call('HGET', config, 'v')
--@include layout
local ids, states, scores = {}, {}, {}
if state == 'ready' then
  for level = 10, 1, -1 do
    if #ids == limit then break end
    local length = redis.call('LLEN', ready[level])
    if skip < length then
      for _, id in ipairs(redis.call('LRANGE', ready[level], skip, skip + limit - #ids - 1)) do ids[#ids + 1] = id end
    end
    skip = math.max(0, skip - length)
  end
else
  local set = ({delayed = delayed, inflight = leases, dead = dead})[state]
  local page = redis.call('ZRANGE', set, skip, skip + limit - 1, 'WITHSCORES')
  for i = 1, #page, 2 do
    ids[#ids + 1] = page[i]
    scores[#ids] = page[i + 1]
  end
end
for i = 1, #ids do states[i] = state end
return rows(ids, states, scores)
