#!lua flags=allow-oom
-- extend: the heartbeat; leases end later than they would have
-- KEYS[1] o HASH id -> delivery state
-- KEYS[2] l ZSET id, score = lease deadline, unix ms
-- KEYS[3] c HASH settings
-- ARGV[1] lease from now, ms | ARGV[2..] two per job, at most 200 jobs: id | token
-- returns answer per job: 1 extended, 0 lease lost
-- moves: none | cost O(jobs log inflight)
local owners, leases, config = KEYS[1], KEYS[2], KEYS[3]
local lease_ms, args = tonumber(ARGV[1]), ARGV
--@include clock
--@include owner
local ids, answers, until_then = {}, {}, {}
for at = 2, #args, 2 do ids[#ids + 1] = args[at] end
local states = redis.call('HMGET', owners, unpack(ids))
for i, id in ipairs(ids) do
  local token, _, _, _, flag = parse_owner(states[i])
  if flag == 'h' and token == args[2 * i + 1] then
    answers[i] = 1
    until_then[#until_then + 1] = now + lease_ms
    until_then[#until_then + 1] = id
  else
    answers[i] = 0
  end
end
if #until_then > 0 then
  redis.call('ZADD', leases, 'XX', unpack(until_then))
  local due = redis.call('HGET', config, 'due')
  if not due or tonumber(due) > now + lease_ms then redis.call('HSET', config, 'due', now + lease_ms) end
end
return answers
