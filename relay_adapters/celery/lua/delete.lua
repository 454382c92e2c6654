#!lua flags=allow-oom
-- delete: forget a queue and all its bindings; a mailbox goes with its messages
-- KEYS[1] q HASH queue -> what it is, JSON
-- KEYS[2] e ZSET queue, score = unix ms at which it ends unless it is used before
-- KEYS[3] v HASH exchange -> version of its bindings; '' -> how many there were
-- KEYS[4] w SET where this queue is bound
-- KEYS[5] c ZSET consumer of this queue, score = unix ms until which it counts as alive
-- KEYS[6] b STREAM messages of this queue, where it is a mailbox
-- KEYS[7] s SET queues of jobs with a time limit for messages, which have to be looked after
-- KEYS[8..] t SET bindings of an exchange that it is bound to, one per binding
-- ARGV[1] queue | ARGV[2] '' in any case, 'unused' without consumers, 'ended' when its time is over and it is not spared,
--   'vanished' a mailbox whose messages' key has ended
-- ARGV[3..] two per binding: exchange | binding, JSON
-- returns 1; 0 when it was bound elsewhere in the meantime; -1 when the condition does not hold
-- moves: none | cost O(bindings)
local queues, ends, versions, places, consumers, box, limited = unpack(KEYS, 1, 7)
local queue, condition, args = ARGV[1], ARGV[2], ARGV
local TABLES = 7 -- the bindings of the nth exchange are KEYS[TABLES + n]
--@include clock
--@include stamp
--@include spared
if condition == 'unused' and redis.call('ZCOUNT', consumers, now, '+inf') > 0 then return -1 end
if condition == 'vanished' and redis.call('EXISTS', box) == 1 then return -1 end
if condition == 'ended' then
  local at = redis.call('ZSCORE', ends, queue)
  if not at or tonumber(at) > now or spared() then return -1 end
end
if redis.call('SCARD', places) ~= (#args - 2) / 2 then return 0 end
for at = 3, #args, 2 do
  if redis.call('SREM', KEYS[TABLES + (at - 1) / 2], args[at + 1]) == 1 then
    redis.call('HSET', versions, args[at], stamp())
  end
end
redis.call('HDEL', queues, queue)
redis.call('ZREM', ends, queue)
redis.call('SREM', limited, queue)
redis.call('DEL', places, consumers, box)
return 1
