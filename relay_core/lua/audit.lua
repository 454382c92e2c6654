#!lua flags=allow-oom
-- audit: look closely at a few suspect ids and repair what is wrong with them
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] s HASH counters
-- KEYS[4] m ZSET wake marker
-- KEYS[5] d ZSET id, score = due time, unix ms
-- KEYS[6] l ZSET id, score = lease deadline, unix ms
-- KEYS[7] x ZSET id, score = time of death, unix ms
-- KEYS[8] o HASH id -> delivery state
-- KEYS[9] e HASH id -> last failure
-- KEYS[10] g ZSET id, score = unix ms from which on anybody may tell of its burial
-- KEYS[11..20] r0..r9 LIST id, one per priority level
-- KEYS[21] y HASH id -> payload, of jobs whose record says that it lies apart
-- ARGV[1] layout version | ARGV[2] 1 to repair, 0 to report | ARGV[3..] at most 50 ids
-- returns finding per id: '' sound; no_record: in a state without a record, taken out; no_state: has a record only,
--   made ready; two_states: kept in the strongest of inflight, dead, delayed, ready; wrong_list: moved to the list of
--   its level; no_lease: a lease without a holder, made ready, or a holder without a lease, who loses the job;
--   leftover: nothing but a delivery state, error or payload, or a burial to tell of whose job is not dead, dropped;
--   no_payload: it lay apart, and is gone: left, as the next claim of the job moves it to dead
-- moves: repairs | cost O(ready) per id
local config, jobs, counters, marker, delayed, leases, dead, owners, errors, untold = unpack(KEYS, 1, 10)
local ready, payloads = {unpack(KEYS, 11, 20)}, KEYS[21]
local layout, repair, ids = ARGV[1], ARGV[2] == '1', {unpack(ARGV, 3)}
--@include owner
--@include record
--@include whole
local found = redis.call('HGET', config, 'v')
--@include layout

local function drop_everywhere(id, where)
  for _, set in ipairs({leases, dead, delayed}) do
    if set ~= where then redis.call('ZREM', set, id) end
  end
  for _, list in ipairs(ready) do redis.call('LREM', list, 0, id) end
  if where ~= dead then redis.call('ZREM', untold, id) end
end

local function end_hold(id, state)
  local token, _, _, retries = parse_owner(state)
  if state then redis.call('HSET', owners, id, token .. ' ' .. retries .. ' r') end
end

local function make_ready(id, record, state)
  drop_everywhere(id)
  end_hold(id, state)
  redis.call('RPUSH', ready[parse_record(record) + 1], id)
  redis.call('ZADD', marker, 0, 'w')
end

local answers, repaired = {}, 0
for i, id in ipairs(ids) do
  local record, state = redis.call('HGET', jobs, id), redis.call('HGET', owners, id)
  local _, _, _, _, flag = parse_owner(state)
  local has_payload, apart = redis.call('HEXISTS', payloads, id) == 1, lies_apart(record)
  local places, strongest, level = 0, nil, nil
  for _, set in ipairs({leases, dead, delayed}) do
    if redis.call('ZSCORE', set, id) then
      places = places + 1
      strongest = strongest or set
    end
  end
  for index, list in ipairs(ready) do
    local found = #redis.call('LPOS', list, id, 'COUNT', 0)
    places = places + found
    if found > 0 then level = index end
  end
  local finding = ''
  if not record then
    if places > 0 then finding = 'no_record'
    elseif state or has_payload or redis.call('HEXISTS', errors, id) == 1 or redis.call('ZSCORE', untold, id) then
      finding = 'leftover'
    end
    if finding ~= '' and repair then
      drop_everywhere(id)
      redis.call('HDEL', owners, id)
      redis.call('HDEL', errors, id)
      redis.call('HDEL', payloads, id)
    end
  elseif places == 0 then
    finding = 'no_state'
    if repair then make_ready(id, record, state) end
  elseif strongest == leases and flag ~= 'h' then
    finding = 'no_lease'
    if repair then make_ready(id, record, state) end
  elseif places > 1 then
    finding = 'two_states'
    if repair then
      if strongest then drop_everywhere(id, strongest) else make_ready(id, record, state) end
      if strongest ~= leases and flag == 'h' then end_hold(id, state) end
    end
  elseif strongest and strongest ~= leases and flag == 'h' then
    finding = 'no_lease'
    if repair then end_hold(id, state) end
  elseif level and (level ~= parse_record(record) + 1 or flag == 'h') then
    finding = level ~= parse_record(record) + 1 and 'wrong_list' or 'no_lease'
    if repair then make_ready(id, record, state) end
  elseif strongest ~= dead and redis.call('ZSCORE', untold, id) then
    finding = 'leftover'
    if repair then redis.call('ZREM', untold, id) end
  elseif has_payload and not apart then
    finding = 'leftover'
    if repair then redis.call('HDEL', payloads, id) end
  elseif apart and not has_payload then
    finding = 'no_payload'
  end
  if finding ~= '' and finding ~= 'no_payload' then repaired = repaired + 1 end
  answers[i] = finding
end
if repair and repaired > 0 then redis.call('HINCRBY', counters, 'repaired', repaired) end
return answers
