#!lua flags=allow-oom
-- bind: make an exchange known, where its properties are given, and let its messages reach a queue
-- KEYS[1] x HASH exchange -> its properties, JSON
-- KEYS[2] q HASH queue -> what it is, JSON
-- KEYS[3] t SET bindings of this exchange
-- KEYS[4] w SET where this queue is bound
-- KEYS[5] v HASH exchange -> version of its bindings; '' -> how many there were; 'amq.' -> since when there are any
-- ARGV[1] exchange | ARGV[2] queue, '' none | ARGV[3] binding, JSON | ARGV[4] where, JSON
-- ARGV[5] the exchange's properties, JSON, '' for one that must be there
-- returns {1, since when there are declarations, the exchange's properties as they are}; {0} no such exchange,
--   {-1} no such queue: then nothing was written
-- moves: none | cost O(1)
local exchanges, queues, bindings, places, versions = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local exchange, queue, binding, where, properties = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
--@include clock
--@include stamp
--@include since
local found = redis.call('HGET', exchanges, exchange)
if not found and properties == '' then return {0} end
if queue ~= '' and redis.call('HEXISTS', queues, queue) == 0 then return {-1} end
if not found then redis.call('HSET', exchanges, exchange, properties) end
if queue ~= '' then
  redis.call('SADD', places, where)
  if redis.call('SADD', bindings, binding) == 1 then
    redis.call('HSET', versions, exchange, stamp())
  end
end
return {1, since(), found or properties}
