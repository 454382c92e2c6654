#!lua flags=allow-oom,no-writes
-- due: the schedules whose next tick has come, the latest ones last
-- KEYS[1] p HASH schedule -> plan
-- KEYS[2] n ZSET schedule, score = its next tick, unix ms
-- ARGV[1] schedules to pass over | ARGV[2] most schedules to return, 0..100
-- returns {now, ms until the first tick that has not come, 0: more are due, -1: never,
--   schedule, its tick, plan or '', ...}
-- moves: none | cost O(log schedules + returned)
local plans, next_ticks = unpack(KEYS, 1, 2)
local skip, limit = tonumber(ARGV[1]), tonumber(ARGV[2])
--@include clock
local page = redis.call('ZRANGE', next_ticks, skip, skip + limit, 'WITHSCORES')
local flat = {now, -1}
for at = 1, #page, 2 do
  local tick = tonumber(page[at + 1])
  if tick > now then
    flat[2] = tick - now
    break
  end
  if at > 2 * limit then
    flat[2] = 0
    break
  end
  flat[#flat + 1] = page[at]
  flat[#flat + 1] = tick
  flat[#flat + 1] = redis.call('HGET', plans, page[at]) or ''
end
return flat
