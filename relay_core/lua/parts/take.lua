-- take: lease up to `want` ready jobs, highest level first
-- uses: now, config, jobs, ready, leases, dead, owners, errors, dedup, counters, marker,
--       parse_owner, parse_record, bury, lower_due
-- moves: ready -> inflight, or dead past max deliveries | cost O(want log inflight)
-- gate(want): how many the queue's settings allow now, status, ms until asking again makes sense (-1: unknown);
--   status 0 free, 1 paused, 2 rate, 3 max_inflight; the fourth result spends rate tokens
-- take(want, lease_ms, nonce, max_deliveries, levels, due, rows, gone): appends {id, token, retries, record}
--   to `rows`; returns the number taken and the new due
-- regrant(nonce, rows): what an earlier send of this same claim took, found among the latest 1,000 leases
local function gate(want)
  local set = redis.call('HMGET', config, 'paused', 'rate', 'burst', 'max_inflight', 'tokens', 'stamp')
  if set[1] then return 0, 1, -1 end
  local allowed = want
  if set[4] then
    local room = tonumber(set[4]) - redis.call('ZCARD', leases)
    if room < 1 then return 0, 3, 1000 end
    if room < allowed then allowed = room end
  end
  if not set[2] then return allowed, 0, -1 end
  local rate, burst = tonumber(set[2]), tonumber(set[3])
  local tokens = burst
  if set[5] then
    tokens = math.min(burst, tonumber(set[5]) + math.max(0, now - tonumber(set[6])) * rate / 1000)
  end
  if tokens < 1 then return 0, 2, math.ceil((1 - tokens) * 1000 / rate) end
  if tokens < allowed then allowed = math.floor(tokens) end
  return allowed, 0, -1, function(spent)
    redis.call('HSET', config, 'tokens', tostring(tokens - spent), 'stamp', now)
  end
end

local function take(want, lease_ms, nonce, max_deliveries, levels, due, rows, gone)
  local ids = {}
  for i = 1, #levels do
    local got = redis.call('LPOP', ready[string.byte(levels, i) - 47], want - #ids)
    if got then
      if #ids == 0 then ids = got else for _, id in ipairs(got) do ids[#ids + 1] = id end end
      if #ids == want then break end
    end
  end
  if #ids == 0 then return 0, due end
  local records = redis.call('HMGET', jobs, unpack(ids))
  local states = redis.call('HMGET', owners, unpack(ids))
  local fence = redis.call('HINCRBY', counters, 'claimed', #ids) - #ids
  local deadline = now + lease_ms
  local held, until_then = {}, {}
  for i, id in ipairs(ids) do
    local record = records[i]
    -- an id without a record was left by a store that lost a write: there is nothing to run
    if record then
      local deliveries, retries, old = 0, 0, ''
      if states[i] then old, deliveries, _, retries = parse_owner(states[i]) end
      local _, own_max
      if deliveries > retries then _, own_max = parse_record(record) end
      if own_max and deliveries - retries >= (own_max > 0 and own_max or max_deliveries) then
        bury(id, old, retries, record, 'r', 'max_deliveries', 'delivered ' .. (deliveries - retries) .. ' times without an answer')
        gone[#gone + 1] = id
        gone[#gone + 1] = old
        gone[#gone + 1] = retries
        gone[#gone + 1] = record
      else
        local token = (deliveries + 1) .. ':' .. (fence + i) .. ':' .. nonce
        held[#held + 1] = id
        held[#held + 1] = token .. ' ' .. retries .. ' h'
        until_then[#until_then + 1] = deadline
        until_then[#until_then + 1] = id
        rows[#rows + 1] = id
        rows[#rows + 1] = token
        rows[#rows + 1] = retries
        rows[#rows + 1] = record
      end
    end
  end
  if #held > 0 then
    redis.call('HSET', owners, unpack(held))
    redis.call('ZADD', leases, unpack(until_then))
    due = lower_due(due, deadline)
  end
  return #ids, due
end

local function regrant(nonce, rows)
  local ids = redis.call('ZREVRANGE', leases, 0, 999)
  if #ids == 0 then return end
  local states = redis.call('HMGET', owners, unpack(ids))
  for i, id in ipairs(ids) do
    local token, _, found, retries, flag = parse_owner(states[i])
    local record = found == nonce and flag == 'h' and redis.call('HGET', jobs, id)
    if record then
      rows[#rows + 1] = id
      rows[#rows + 1] = token
      rows[#rows + 1] = retries
      rows[#rows + 1] = record
    end
  end
end
