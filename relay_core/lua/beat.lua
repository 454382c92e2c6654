#!lua flags=allow-oom
-- beat: a worker says that it lives and what it does, or that it stops; workers that fell silent are forgotten
-- KEYS[1] w ZSET worker, score = unix ms until which it counts as alive
-- KEYS[2] i HASH worker -> what it said last
-- ARGV[1] worker | ARGV[2] ms for which it counts as alive from now, 0: it stops | ARGV[3] ms since its start
-- ARGV[4] what it says of itself, JSON | ARGV[5] most workers that are kept
-- returns workers that are kept now
-- moves: none | cost O(log workers), and of each worker that is forgotten
local alive, about = KEYS[1], KEYS[2]
local worker, alive_ms, age_ms, says, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
--@include clock
local gone = redis.call('ZRANGE', alive, '-inf', now, 'BYSCORE', 'LIMIT', 0, 100)
if alive_ms == 0 then
  gone[#gone + 1] = worker
else
  redis.call('ZADD', alive, now + alive_ms, worker)
  redis.call('HSET', about, worker, string.format('%.0f %.0f ', now - age_ms, now) .. says)
  for i, id in ipairs(gone) do
    -- this one was silent, and is back
    if id == worker then table.remove(gone, i) break end
  end
end
if #gone > 0 then
  redis.call('ZREM', alive, unpack(gone))
  redis.call('HDEL', about, unpack(gone))
end
local kept = redis.call('ZCARD', alive)
if kept > most then
  -- workers that start and die faster than they are forgotten: the longest silent go
  local over = redis.call('ZRANGE', alive, 0, math.min(kept - most, 100) - 1)
  redis.call('ZREM', alive, unpack(over))
  redis.call('HDEL', about, unpack(over))
  kept = kept - #over
end
return kept
