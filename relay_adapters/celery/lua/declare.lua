#!lua flags=allow-oom
-- declare: make a queue known, or say that a known one is in use
-- KEYS[1] q HASH queue -> what it is, JSON
-- KEYS[2] e ZSET queue, score = unix ms at which it ends unless it is used before
-- KEYS[3] c ZSET consumer of this queue, score = unix ms until which it counts as alive
-- KEYS[4] b STREAM messages of this queue, where it is a mailbox
-- KEYS[5] s SET queues of jobs with a time limit for messages, which have to be looked after
-- KEYS[6] v HASH exchange -> version of its bindings; '' -> how many there were; 'amq.' -> since when there are any
-- ARGV[1] queue | ARGV[2] what it is, JSON | ARGV[3] what it is known as, JSON, '' when it is not known
-- ARGV[4] ms without use after which it ends, 0 never | ARGV[5] 1 for a mailbox
-- ARGV[6] this process: its own consumers are not counted | ARGV[7] 1 for a queue to be looked after
-- returns {1, consumers of other processes, since when there are declarations}, or {0, what it is known as}: then
--   nothing was written
-- moves: none | cost O(log queues + consumers)
local queues, ends, consumers, box, limited, versions = unpack(KEYS, 1, 6)
local queue, new, known, idle_ms, mailbox, process = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5] == '1', ARGV[6]
local looked_after = ARGV[7] == '1'
--@include clock
--@include since
local found = redis.call('HGET', queues, queue) or ''
if found ~= known and found ~= new then return {0, found} end
if found ~= new then redis.call('HSET', queues, queue, new) end
if idle_ms > 0 then redis.call('ZADD', ends, now + idle_ms, queue) else redis.call('ZREM', ends, queue) end
if looked_after then redis.call('SADD', limited, queue) end
if mailbox then
  if redis.call('EXISTS', box) == 0 then redis.call('XGROUP', 'CREATE', box, 'q', '0', 'MKSTREAM') end
  redis.call('PEXPIRE', box, idle_ms)
end
local others = 0
for _, consumer in ipairs(redis.call('ZRANGE', consumers, now, '+inf', 'BYSCORE')) do
  if string.sub(consumer, 1, #process) ~= process then others = others + 1 end
end
return {1, others, since()}
