#!lua flags=allow-oom
-- unbind: an exchange's messages no longer reach a queue by this binding
-- KEYS[1] t SET bindings of this exchange
-- KEYS[2] w SET where this queue is bound
-- KEYS[3] v HASH exchange -> version of its bindings; '' -> how many there were
-- ARGV[1] exchange | ARGV[2] binding, JSON | ARGV[3] where, JSON
-- returns 1 when it was bound, 0 when not
-- moves: none | cost O(1)
local bindings, places, versions = KEYS[1], KEYS[2], KEYS[3]
local exchange, binding, where = ARGV[1], ARGV[2], ARGV[3]
--@include clock
--@include stamp
redis.call('SREM', places, where)
if redis.call('SREM', bindings, binding) == 0 then return 0 end
redis.call('HSET', versions, exchange, stamp())
return 1
