#!lua flags=allow-oom
-- bind: let an exchange's messages reach a queue
-- KEYS[1] x HASH exchange -> its properties, JSON
-- KEYS[2] q HASH queue -> what it is, JSON
-- KEYS[3] t SET bindings of this exchange
-- KEYS[4] w SET where this queue is bound
-- KEYS[5] v HASH exchange -> version of its bindings; '' -> how many there were
-- ARGV[1] exchange | ARGV[2] queue | ARGV[3] binding, JSON | ARGV[4] where, JSON
-- returns 1; 0 no such exchange, -1 no such queue
-- moves: none | cost O(1)
local exchanges, queues, bindings, places, versions = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local exchange, queue, binding, where = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
--@include clock
--@include stamp
if redis.call('HEXISTS', exchanges, exchange) == 0 then return 0 end
if redis.call('HEXISTS', queues, queue) == 0 then return -1 end
redis.call('SADD', places, where)
if redis.call('SADD', bindings, binding) == 1 then
  redis.call('HSET', versions, exchange, stamp())
end
return 1
