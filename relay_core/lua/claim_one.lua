#!lua flags=allow-oom
-- claim_one: lease one ready job of one queue partition, the short way: nothing is due, no limit is set, and the job
--   was never claimed
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] s HASH counters
-- KEYS[4] l ZSET id, score = lease deadline, unix ms
-- KEYS[5] o HASH id -> delivery state
-- KEYS[6..15] LIST id, the ready lists of the levels that are named below, in their order
-- ARGV[1] layout version | ARGV[2] the levels that the caller knows to be in use, highest first, a digit each
-- ARGV[3] 0, or ms since an earlier send that may have run | ARGV[4] lease, ms | ARGV[5] nonce
-- returns {hint ms, now, id, token, record} | {hint ms, now}: none is ready; -1: only a wake-up tells | levels, a text:
--   nothing was done, take the long way, which is finish
-- moves: ready -> inflight | cost O(log inflight)
local config, jobs, counters, leases, owners = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local FIRST_LIST = 5 -- the ready list of the nth digit of `named` is KEYS[FIRST_LIST + n]
local layout, named, resent, lease_ms, nonce = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
--@include clock
local set = redis.call('HMGET', config, 'v', 'levels', 'due', 'gate')
local found, levels, due = set[1], set[2] or '', tonumber(set[3] or nil)
--@include layout
if levels ~= named or set[4] or (due and due <= now) or resent ~= '0' then return levels end

for n = 1, #named do
  local id = redis.call('LPOP', KEYS[FIRST_LIST + n])
  if id then
    local record = redis.call('HGET', jobs, id)
    local token = string.format('1:%d:%st%x', redis.call('HINCRBY', counters, 'claimed', 1), nonce, now / 1000)
    if not record or redis.call('HSETNX', owners, id, token .. ' 0 h') == 0 then
      -- claimed before, perhaps one delivery over its bound: it goes back, the long way looks closer
      redis.call('HINCRBY', counters, 'claimed', -1)
      redis.call('LPUSH', KEYS[FIRST_LIST + n], id)
      return levels
    end
    local deadline = now + lease_ms
    local deadline_text = string.format('%d', deadline)
    redis.call('ZADD', leases, deadline_text, id)
    if not due or deadline < due then
      redis.call('HSET', config, 'due', deadline_text)
      due = deadline
    end
    return {due - now, now, id, token, record}
  end
end
return {due and due - now or -1, now}
