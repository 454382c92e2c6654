#!lua flags=allow-oom
-- discard: forget an exchange and all its bindings; the queues stay
-- KEYS[1] x HASH exchange -> its properties, JSON
-- KEYS[2] v HASH exchange -> version of its bindings; '' -> how many there were
-- KEYS[3] t SET bindings of this exchange
-- KEYS[4..] w SET where a queue is bound, one per binding
-- ARGV[1] exchange | ARGV[2] 1 only if it has no bindings
-- ARGV[3..] where, JSON, one per binding
-- returns 1; 0 when its bindings are others, -1 when it has bindings and must not
-- moves: none | cost O(bindings)
local exchanges, versions, bindings = KEYS[1], KEYS[2], KEYS[3]
local exchange, unused, args = ARGV[1], ARGV[2] == '1', ARGV
local PLACES = 3 -- where the nth queue is bound is in KEYS[PLACES + n]
--@include clock
--@include stamp
local bound = redis.call('SCARD', bindings)
if unused and bound > 0 then return -1 end
if bound ~= #args - 2 then return 0 end
for at = 3, #args do redis.call('SREM', KEYS[PLACES + at - 2], args[at]) end
redis.call('HDEL', exchanges, exchange)
redis.call('DEL', bindings)
redis.call('HSET', versions, exchange, stamp())
return 1
