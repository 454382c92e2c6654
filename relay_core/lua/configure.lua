#!lua flags=allow-oom
-- configure: change a queue's settings, so that all workers agree on them
-- KEYS[1] c HASH settings
-- KEYS[2] m ZSET wake marker
-- ARGV[1] layout version | ARGV[2..] two per setting: name (paused, rate, burst, max_inflight) | value, '' to unset
-- returns 1
-- moves: none | cost O(settings)
local config, marker = KEYS[1], KEYS[2]
local layout, args = ARGV[1], ARGV
local found = redis.call('HGET', config, 'v')
--@include layout
for at = 2, #args, 2 do
  -- a changed rate starts with a full bucket; the same one is set again by each process that starts, perhaps
  if args[at] == 'rate' and args[at + 1] ~= (redis.call('HGET', config, 'rate') or '') then
    redis.call('HDEL', config, 'tokens', 'stamp')
  end
  if args[at + 1] == '' then
    redis.call('HDEL', config, args[at])
  else
    redis.call('HSET', config, args[at], args[at + 1])
  end
end
-- claims read the settings below only where `gate` says that there are any
local set = redis.call('HMGET', config, 'paused', 'rate', 'max_inflight')
if set[1] or set[2] or set[3] then redis.call('HSET', config, 'gate', 1) else redis.call('HDEL', config, 'gate') end
redis.call('HSETNX', config, 'v', layout)
redis.call('ZADD', marker, 0, 'w')
return 1
