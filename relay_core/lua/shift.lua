#!lua flags=allow-oom
-- shift: time passes at once, for tests of applications; nothing else in relay sends it
-- KEYS[1] c HASH settings
-- KEYS[2] d ZSET id, score = due time, unix ms
-- KEYS[3] l ZSET id, score = lease deadline, unix ms
-- KEYS[4] x ZSET id, score = time of death, unix ms
-- KEYS[5] t ZSET dedup key, score = unix ms at which it is free
-- KEYS[6] m ZSET wake marker
-- KEYS[7] g ZSET id, score = unix ms from which on anybody may tell of its burial
-- ARGV[1] layout version | ARGV[2] ms that pass | ARGV[3] 1: leases and all else get older too, 0: delayed jobs alone
-- returns number of delayed jobs
-- moves: none | cost O(all of these)
local config, delayed, leases, dead, dedup_expiry, marker, untold = unpack(KEYS, 1, 7)
local layout, ms, all = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1'
local CHUNK = 1000 -- members in one command
local set = redis.call('HMGET', config, 'v', 'due', 'stamp')
local found, due, stamp = set[1], tonumber(set[2] or nil), tonumber(set[3] or nil)
--@include layout
local function move(key)
  local page = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for from = 1, #page, 2 * CHUNK do
    local pairs_of = {}
    for at = from, math.min(#page, from + 2 * CHUNK - 1), 2 do
      pairs_of[#pairs_of + 1] = tonumber(page[at + 1]) - ms
      pairs_of[#pairs_of + 1] = page[at]
    end
    redis.call('ZADD', key, unpack(pairs_of))
  end
  return #page / 2
end
local moved = move(delayed)
if all then
  move(leases)
  move(dead)
  move(dedup_expiry)
  move(untold)
end
if due then redis.call('HSET', config, 'due', due - ms) end
if stamp then redis.call('HSET', config, 'stamp', stamp - ms) end
redis.call('ZADD', marker, 0, 'w')
return moved
