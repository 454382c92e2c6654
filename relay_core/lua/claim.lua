#!lua flags=allow-oom
-- claim: lease ready jobs of one queue partition, the short way: as long as nothing is due and no limit is set; and ack
--   jobs that never failed
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
-- ARGV[8..] two per ack, at most 200 jobs, each named once: id | token
-- returns {hint ms, now, fence, id, record, ...}: the nth token is 1:<fence + n>:<nonce>t<now / 1000, hexadecimal>; or
--   levels, a text: nothing was done, take the long way, which is finish
-- moves: ready -> inflight | inflight -> done | cost O((acks + count) log inflight)
local config, jobs, counters, marker, leases, owners = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local finished = KEYS[7]
local FIRST_LIST = 7 -- the ready list of the nth digit of `named` is KEYS[FIRST_LIST + n]
local layout, named, resent, count, lease_ms, nonce = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local woken, args = ARGV[7] == '1', ARGV
local want = tonumber(count)
--@include clock
local set = redis.call('HMGET', config, 'v', 'levels', 'due', 'gate')
local found, levels, due = set[1], set[2] or '', tonumber(set[3] or nil)
--@include layout
if levels ~= named or set[4] or (due and due <= now) or resent ~= '0' then return levels end

local done, past
if #args > 7 then
  done, past = {}, {}
  for at = 8, #args, 2 do
    done[#done + 1], past[#past + 1] = args[at], args[at] .. ' ' .. args[at + 1]
  end
  local states = redis.call('HMGET', owners, unpack(done))
  for i = 1, #done do
    -- 103 is 'g', see parts/claim
    local token = args[2 * i + 7]
    if states[i] ~= token .. ' 0 h' or string.byte(token, -1) == 103 then return levels end
  end
end

local ids
for n = 1, #named do
  local got = redis.call('LPOP', KEYS[FIRST_LIST + n], ids and want - #ids or count)
  if got then
    if ids then for _, id in ipairs(got) do ids[#ids + 1] = id end else ids = got end
    if #ids == want then break end
  end
end
local records
if ids then
  records = redis.call('HMGET', jobs, unpack(ids))
  local states = redis.call('HMGET', owners, unpack(ids))
  for i = #ids, 1, -1 do
    if states[i] or not records[i] then
      -- a job that was claimed before may be one delivery over its bound: all go back, the long way looks closer
      for n = #ids, 1, -1 do
        local level = records[n] and string.match(records[n], '^%d+ (%d)') or '0'
        redis.call('LPUSH', KEYS[FIRST_LIST + (string.find(named, level, 1, true) or #named)], ids[n])
      end
      return levels
    end
  end
end

-- from here on nothing sends the caller the long way
if done then
  redis.call('HDEL', jobs, unpack(done))
  redis.call('HDEL', owners, unpack(done))
  redis.call('ZREM', leases, unpack(done))
  local kept = redis.call('RPUSH', finished, unpack(past))
  --@include trim
end
local reply = {-1, now, 0}
if ids then
  local fence = redis.call('HINCRBY', counters, 'claimed', #ids) - #ids
  local deadline = now + lease_ms
  -- as text once: a number is formatted anew for each job; %.0f is exact
  local deadline_text = string.format('%.0f', deadline)
  local tail, held, until_then, n = string.format(':%st%x 0 h', nonce, now / 1000), {}, {}, 0
  for i, id in ipairs(ids) do
    held[n + 1], held[n + 2] = id, '1:' .. fence + i .. tail
    until_then[n + 1], until_then[n + 2] = deadline_text, id
    reply[n + 4], reply[n + 5] = id, records[i]
    n = n + 2
  end
  reply[3] = fence
  if redis.call('HSET', owners, unpack(held)) < #ids then
    -- one id twice, see parts/elsewhere: it has one lease
    local once, m = {}, 0
    for i, id in ipairs(ids) do
      if not once[id] then
        once[id], m = true, m + 1
        redis.call('HSET', owners, id, '1:' .. fence + m .. tail)
        reply[2 * m + 2], reply[2 * m + 3] = id, records[i]
      end
    end
    for at = #reply, 2 * m + 4, -1 do reply[at] = nil end
  end
  redis.call('ZADD', leases, unpack(until_then))
  if not due or deadline < due then
    redis.call('HSET', config, 'due', deadline_text)
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
