#!lua flags=allow-oom
-- leave: a consumer is gone from a queue; what a mailbox gave it stays for its return, see relay_core reader
-- KEYS[1] c ZSET consumer of this queue, score = unix ms until which it counts as alive
-- KEYS[2] e ZSET queue, score = unix ms at which it ends unless it is used before
-- KEYS[3] b STREAM messages of this queue, where it is a mailbox
-- ARGV[1] queue | ARGV[2] consumer | ARGV[3] ms after which the queue ends when this was the last one, 0: it stays
-- returns consumers that are left
-- moves: none | cost O(log consumers)
local consumers, ends, box = KEYS[1], KEYS[2], KEYS[3]
local queue, consumer, grace_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
--@include clock
redis.call('ZREM', consumers, consumer)
local left = redis.call('ZCOUNT', consumers, now, '+inf')
if left == 0 and grace_ms > 0 then
  redis.call('ZADD', ends, 'XX', 'LT', now + grace_ms, queue)
  redis.call('PEXPIRE', box, grace_ms, 'LT')
end
return left
