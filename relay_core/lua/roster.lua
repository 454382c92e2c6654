#!lua flags=allow-oom,no-writes
-- roster: a page of the workers that live
-- KEYS[1] w ZSET worker, score = unix ms until which it counts as alive
-- KEYS[2] i HASH worker -> what it said last
-- ARGV[1] score to begin with, unix ms; 0: now | ARGV[2] most to return, 1..500
-- returns {now, score of the last one, worker, what it said, worker, ...}, the longest silent first
-- moves: none | cost O(log workers + returned)
local alive, about = KEYS[1], KEYS[2]
local from, limit = ARGV[1], ARGV[2]
--@include clock
local first = math.max(now + 1, tonumber(from))
local pairs_of = redis.call('ZRANGE', alive, string.format('%.0f', first), '+inf', 'BYSCORE', 'LIMIT', 0, limit, 'WITHSCORES')
local names = {}
for i = 1, #pairs_of, 2 do names[#names + 1] = pairs_of[i] end
if #names == 0 then return {now, 0} end
local said = redis.call('HMGET', about, unpack(names))
local reply = {now, tonumber(pairs_of[#pairs_of])}
for i, name in ipairs(names) do
  reply[2 * i + 1], reply[2 * i + 2] = name, said[i] or ''
end
return reply
