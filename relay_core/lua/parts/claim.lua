-- claim: the long way to claim, with all that a claim may have to do. Plain code, since it runs once, and what is
--   rarely needed is included where it is needed: a closure costs as much as a command
-- uses: now, config, jobs, payloads, counters, marker, delayed, leases, dead, owners, errors, dedup, dedup_expiry, READY,
--   layout, resent, want, lease_ms, nonce, max_deliveries, keep_ms, woken, untold
-- defines: reply = {status, hint ms, now, promoted, reaped, buried rows, levels, id, token, retries, record, ...}
--   status 0 free, 1 paused, 2 rate, 3 max_inflight; hint: ms until asking again makes sense, -1: only a wake-up tells;
--   buried rows: flat {id, token, retries, record, ...} of jobs that went to dead here
local set = redis.call('HMGET', config, 'v', 'levels', 'due', 'gate')
local found, levels, due = set[1], set[2] or '', tonumber(set[3] or nil)
--@include layout
local gone, promoted, reaped = {}, 0, 0
if due and due <= now then
  --@include owner
  --@include record
  --@include whole
  --@include dedup
  --@include bury
  --@include sweep
  promoted = promote(200)
  reaped = reap(200, max_deliveries, gone)
  -- claims are soon enough again to keep up with what runs out only if they come back for the rest at once
  local _, more = forget(200, keep_ms)
  due = set_due(more)
end
local reply, status, hint, rate, tokens = {0, -1, now, promoted, reaped, gone, levels}, 0, -1, nil, nil
if resent then
  --@include regrant
  if #reply > 7 then want = 0 end
end
if set[4] and want > 0 then
  --@include gate
end
local ids, taken = nil, 0
if want > 0 then
  for i = 1, #levels do
    local got = redis.call('LPOP', KEYS[READY - 48 + string.byte(levels, i)], want - taken)
    if got then
      if ids then for _, id in ipairs(got) do ids[#ids + 1] = id end else ids = got end
      taken = #ids
      if taken == want then break end
    end
  end
end
if ids then
  local records = redis.call('HMGET', jobs, unpack(ids))
  local states = redis.call('HMGET', owners, unpack(ids))
  local fence = redis.call('HINCRBY', counters, 'claimed', taken) - taken
  local deadline = now + lease_ms
  -- as text once: a number is formatted anew for each job; %.0f is exact
  local deadline_text = string.format('%.0f', deadline)
  -- a token that ends in g tells the ack that max_inflight may hold workers back
  local tail = string.format(':%st%x', nonce, now / 1000) .. (set[4] and 'g' or '')
  local held, until_then, at, once = {}, {}, 7, {}
  for i, id in ipairs(ids) do
    local record, token, retries = records[i], nil, '0'
    if once[id] then
      -- twice here, see parts/elsewhere
    elseif record and not states[i] then
      token = '1:' .. fence + i .. tail
    elseif record then
      --@include owner
      --@include record
      local old, deliveries, _, failed = parse_owner(states[i])
      local _, most = parse_record(record)
      if most == 0 then most = max_deliveries end
      --@include elsewhere
      if elsewhere(id) then
        -- there is nothing to give out here
      elseif deliveries - failed >= most then
        --@include dedup
        --@include bury
        local told = 'delivered ' .. (deliveries - failed) .. ' times without an answer'
        bury(id, old, failed, record, 'r', 'max_deliveries', told)
        --@include whole
        --@include note
        local last = #gone
        gone[last + 1], gone[last + 2], gone[last + 3], gone[last + 4] = id, old, failed, whole(id, record)
      else
        token, retries = deliveries + 1 .. ':' .. fence + i .. tail, failed
      end
    end
    once[id] = true
    -- an id without a record was left by a store that lost a write: there is nothing to run
    if token then
      local n = #held
      held[n + 1], held[n + 2] = id, token .. ' ' .. retries .. ' h'
      until_then[n + 1], until_then[n + 2] = deadline_text, id
      reply[at + 1], reply[at + 2], reply[at + 3], reply[at + 4] = id, token, retries, record
      at = at + 4
    end
  end
  if at > 7 then
    redis.call('HSET', owners, unpack(held))
    redis.call('ZADD', leases, unpack(until_then))
    if not due or deadline < due then
      redis.call('HSET', config, 'due', deadline)
      due = deadline
    end
  else
    hint = 0
  end
  if tokens then redis.call('HSET', config, 'tokens', tostring(tokens - taken), 'stamp', now) end
end
if (woken or promoted + reaped > 0 or tokens) and status == 0 then
  -- who took the marker puts it back while work remains: wakes chain, without a herd
  -- under a rate as well who took none: it ended with one who was told to come later
  for i = 1, #levels do
    if redis.call('EXISTS', KEYS[READY - 48 + string.byte(levels, i)]) == 1 then
      redis.call('ZADD', marker, 0, 'w')
      break
    end
  end
end
if hint < 0 and due then hint = math.max(0, due - now) end
reply[1], reply[2] = status, hint
