#!lua flags=allow-oom
-- touch: a consumer says that it lives, which keeps its queues, and what it has received of its mailboxes
-- KEYS[1] q HASH queue -> what it is, JSON
-- KEYS[2] e ZSET queue, score = unix ms at which it ends unless it is used before
-- KEYS[3] s SET queues of jobs with a time limit for messages, which have to be looked after
-- KEYS[4] v HASH exchange -> version of its bindings; 'amq.told' -> unix ms at which a consumer said anything;
--   'amq.spared' -> unix ms before which no queue ends
-- KEYS[5..] two per queue: c ZSET consumer, score = unix ms until which it counts as alive |
--   b STREAM messages, where it is a mailbox
-- ARGV[1] consumer, '' one who publishes and asks whether a queue may end | ARGV[2] ms for which it counts as alive from now
-- ARGV[3] 1 where it could not say so before: then others could not either, and no queue ends for a while
-- ARGV[4..] five per queue, or per reader of one: queue | ms without use after which it ends, 0 never |
--   ms for which a mailbox keeps a message, 0 no limit, -1 no mailbox | who reads it | id of the last message that this
--   one received, '' none
-- returns {queues that may end as their time is over, queues to be looked after, per row: 1 it is there, 0 it is not}
-- moves: none | cost O(queues log queues + messages received)
local queues, ends, limited, versions = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local consumer, alive_ms, away, args = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1', ARGV
local PLACES = 5 -- consumers and mailbox of the nth row, from 0, are KEYS[PLACES + 2 * n] and the one after
--@include clock
--@include spared
local function drop(box, taken)
  if #taken == 0 then return end
  local ids = {}
  for i, row in ipairs(taken) do ids[i] = row[1] end
  redis.call('XACK', box, 'q', unpack(ids))
  redis.call('XDEL', box, unpack(ids))
end
local asks = consumer == ''
if away or (silent() and not (asks and granted())) then
  redis.call('HSET', versions, 'amq.spared', now + SPARED_MS, 'amq.told', now)
elseif not asks or now >= spared_until() then
  redis.call('HSET', versions, 'amq.told', now)
end
local answers = {0, redis.call('SCARD', limited)}
for at = 4, #args, 5 do
  local n = (at - 4) / 5
  local consumers, box = KEYS[PLACES + 2 * n], KEYS[PLACES + 2 * n + 1]
  local queue, idle_ms, keep_ms = args[at], tonumber(args[at + 1]), tonumber(args[at + 2])
  local reader, last = args[at + 3], args[at + 4]
  local there = redis.call('HEXISTS', queues, queue) == 1
  if there and keep_ms >= 0 then
    there = redis.call('PEXPIRE', box, idle_ms) == 1
    if there and last ~= '' then drop(box, redis.call('XPENDING', box, 'q', '-', last, 1000, reader)) end
    if there and keep_ms > 0 then
      local oldest = string.format('%.0f-0', now - keep_ms)
      redis.call('XTRIM', box, 'MINID', oldest)
      -- whoever had it: those that never came back, too
      drop(box, redis.call('XPENDING', box, 'q', '-', '(' .. oldest, 1000))
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
if not spared() then answers[1] = redis.call('ZCOUNT', ends, '-inf', now) end
return answers
