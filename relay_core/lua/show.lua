#!lua flags=allow-oom,no-writes
-- show: jobs by id, with the state each is in
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] d ZSET id, score = due time, unix ms
-- KEYS[4] l ZSET id, score = lease deadline, unix ms
-- KEYS[5] x ZSET id, score = time of death, unix ms
-- KEYS[6] o HASH id -> delivery state
-- KEYS[7] e HASH id -> last failure
-- KEYS[8..17] r0..r9 LIST id, one per priority level
-- KEYS[18] y HASH id -> payload, of jobs whose record says that it lies apart
-- ARGV[1] layout version | ARGV[2..] at most 200 ids
-- returns six per job as `list` does; state '' for an id that is in none
-- moves: none | cost O(log n) per id, O(ready) for one that is ready
local config, jobs, delayed, leases, dead, owners, errors = unpack(KEYS, 1, 7)
local ready, payloads = {unpack(KEYS, 8, 17)}, KEYS[18]
local layout, ids = ARGV[1], {unpack(ARGV, 2)}
--@include whole
--@include rows
local found = redis.call('HGET', config, 'v')
--@include layout
local states, scores = {}, {}
for i, id in ipairs(ids) do
  states[i] = ''
  for state, set in pairs({delayed = delayed, inflight = leases, dead = dead}) do
    local score = redis.call('ZSCORE', set, id)
    if score then states[i], scores[i] = state, score end
  end
  if states[i] == '' then
    for level = 1, 10 do
      if redis.call('LPOS', ready[level], id) then states[i] = 'ready' end
    end
  end
end
return rows(ids, states, scores)
