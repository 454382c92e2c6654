#!lua flags=allow-oom
-- touch: a consumer says that it lives, which keeps its queues, and what it has received of its mailboxes
-- KEYS[1] q HASH queue -> what it is, JSON
-- KEYS[2] e ZSET queue, score = unix ms at which it ends unless it is used before
-- KEYS[3] s SET queues of jobs with a time limit for messages, which have to be looked after
-- KEYS[4..] two per queue: c ZSET consumer, score = unix ms until which it counts as alive |
--   b STREAM messages, where it is a mailbox
-- ARGV[1] consumer | ARGV[2] ms for which it counts as alive from now
-- ARGV[3..] four per queue: queue | ms without use after which it ends, 0 never |
--   ms for which a mailbox keeps a message, 0 no limit, -1 no mailbox | id of the last message received, '' none
-- returns {queues whose time is over, queues to be looked after, per queue: 1 it is there, 0 it is not}
-- moves: none | cost O(queues log queues + messages received)
local queues, ends, limited = KEYS[1], KEYS[2], KEYS[3]
local consumer, alive_ms, args = ARGV[1], tonumber(ARGV[2]), ARGV
local PLACES = 4 -- consumers and mailbox of the nth queue, from 0, are KEYS[PLACES + 2 * n] and the one after
--@include clock
local answers = {0, redis.call('SCARD', limited)}
for at = 3, #args, 4 do
  local n = (at - 3) / 4
  local consumers, box = KEYS[PLACES + 2 * n], KEYS[PLACES + 2 * n + 1]
  local queue, idle_ms, keep_ms, last = args[at], tonumber(args[at + 1]), tonumber(args[at + 2]), args[at + 3]
  local there = redis.call('HEXISTS', queues, queue) == 1
  if there and keep_ms >= 0 then
    there = redis.call('PEXPIRE', box, idle_ms) == 1
    local ids = {}
    if there and last ~= '' then
      -- its own: what another consumer was given may still be on its way there
      for i, row in ipairs(redis.call('XPENDING', box, 'q', '-', last, 1000, consumer)) do ids[i] = row[1] end
    end
    if there and keep_ms > 0 then
      redis.call('XTRIM', box, 'MINID', string.format('%.0f', now - keep_ms))
      local old = redis.call('XPENDING', box, 'q', '-', string.format('%.0f', now - keep_ms - 1), 1000)
      for _, row in ipairs(old) do ids[#ids + 1] = row[1] end
    end
    if #ids > 0 then
      redis.call('XACK', box, 'q', unpack(ids))
      redis.call('XDEL', box, unpack(ids))
    end
  end
  if there then
    redis.call('ZADD', consumers, now + alive_ms, consumer)
    redis.call('ZREMRANGEBYSCORE', consumers, '-inf', now)
    redis.call('PEXPIRE', consumers, alive_ms)
    if idle_ms > 0 then redis.call('ZADD', ends, now + idle_ms, queue) end
  end
  answers[n + 3] = there and 1 or 0
end
answers[1] = redis.call('ZCOUNT', ends, '-inf', now)
return answers
