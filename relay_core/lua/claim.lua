#!lua flags=allow-oom
-- claim: lease ready jobs of one queue partition, the short way: as long as nothing is due and no limit is set; and ack
--   jobs that never failed, as ack_plain does
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] s HASH counters
-- KEYS[4] m ZSET wake marker
-- KEYS[5] l ZSET id, score = lease deadline, unix ms
-- KEYS[6] o HASH id -> delivery state
-- KEYS[7] f LIST ids finished lately
-- KEYS[8..17] LIST id, the ready lists of the levels that are named below, in their order
-- ARGV[1] layout version | ARGV[2] the levels that the caller knows to be in use, highest first, a digit each
-- ARGV[3] 0, or ms since an earlier send that may have run | ARGV[4] count, 1..200 | ARGV[5] lease, ms | ARGV[6] nonce
-- ARGV[7] 1 when the caller took the wake marker
-- ARGV[8..] two per ack, at most 200, each of a job of its own: the delivery states that they must have, then the ids
-- returns {hint ms, now, fence, id, record, ...}: the nth token is 1:<fence + n>:<nonce>t<now / 1000, hexadecimal>; or
--   levels, a text: nothing was done, take the long way, which is finish
-- moves: ready -> inflight | inflight -> done | cost O((acks + count) log inflight)
local config, jobs, counters, marker, leases, owners = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local finished = KEYS[7]
local FIRST_LIST = 7 -- the ready list of the nth digit of `named` is KEYS[FIRST_LIST + n]
local layout, named, resent, count, lease_ms, nonce = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local woken, args, items_from = ARGV[7] == '1', ARGV, 8
local acks = (#args - 7) / 2
local ids_from = items_from + acks
--@include clock
local set = redis.call('HMGET', config, 'v', 'levels', 'due', 'gate')
local found, levels, due = set[1], set[2] or '', tonumber(set[3] or nil)
--@include layout
if levels ~= named or set[4] or (due and due <= now) or resent ~= '0' then return levels end

local ids, taken, want = nil, 0, tonumber(count)
for n = 1, #named do
  local got = redis.call('LPOP', KEYS[FIRST_LIST + n], want - taken)
  if got then
    if ids then for _, id in ipairs(got) do ids[#ids + 1] = id end else ids = got end
    taken = #ids
    if taken == want then break end
  end
end
local records = ids and redis.call('HMGET', jobs, unpack(ids))
if acks + taken > 0 then
  for n = 1, taken do args[ids_from + acks + n - 1] = ids[n] end
  local states, plain = redis.call('HMGET', owners, unpack(args, ids_from)), true
  -- a token under limits passes: there is none here any more, and so nobody whom its end would have to wake
  for n = 1, acks do plain = plain and states[n] == args[items_from + n - 1] end
  for n = 1, taken do plain = plain and records[n] and not states[acks + n] end
  if not plain then
    -- a job that was claimed before may be one delivery over its bound: all go back, the long way looks closer
    for n = taken, 1, -1 do
      local level = records[n] and string.match(records[n], '^%d+ (%d)') or '0'
      redis.call('LPUSH', KEYS[FIRST_LIST + (string.find(named, level, 1, true) or #named)], ids[n])
    end
    return levels
  end
end

-- from here on nothing sends the caller the long way
if acks > 0 then
  local ids_to = ids_from + acks - 1
  --@include done
end
local reply = {-1, now, 0}
if ids then
  local fence = redis.call('HINCRBY', counters, 'claimed', taken) - taken
  local deadline = now + lease_ms
  -- as text once: a number is formatted anew for each job
  local until_then = string.format('%d', deadline)
  local tail = string.format(':%st%x 0 h', nonce, now / 1000)
  for n, id in ipairs(ids) do reply[2 * n + 2], reply[2 * n + 3] = id, '1:' .. fence + n .. tail end
  if redis.call('HSET', owners, unpack(reply, 4)) < taken then
    -- one id twice, see parts/elsewhere: it has one lease
    local once = {}
    taken = 0
    for n, id in ipairs(ids) do
      if not once[id] then
        once[id], taken = true, taken + 1
        redis.call('HSET', owners, id, '1:' .. fence + taken .. tail)
        reply[2 * taken + 2], records[taken] = id, records[n]
      end
    end
    for at = #reply, 2 * taken + 4, -1 do reply[at] = nil end
  end
  -- the same table again, with the deadline in place of the fence and of each state, and at last as it is returned
  for at = 3, 2 * taken + 1, 2 do reply[at] = until_then end
  redis.call('ZADD', leases, unpack(reply, 3, 2 * taken + 2))
  for n = 1, taken do reply[2 * n + 3] = records[n] end
  reply[3] = fence
  if not due or deadline < due then
    redis.call('HSET', config, 'due', until_then)
    due = deadline
  end
end
if woken then
  -- who took the marker puts it back while work remains: wakes chain, without a herd
  for n = 1, #named do
    if redis.call('EXISTS', KEYS[FIRST_LIST + n]) == 1 then
      redis.call('ZADD', marker, '0', 'w')
      break
    end
  end
end
if due then reply[1] = math.max(0, due - now) end
return reply
