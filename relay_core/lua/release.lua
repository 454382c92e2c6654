#!lua flags=allow-oom
-- release: jobs that were not started go back to the head of their list; the delivery does not count
-- KEYS[1] o HASH id -> delivery state
-- KEYS[2] j HASH id -> record
-- KEYS[3] l ZSET id, score = lease deadline, unix ms
-- KEYS[4] s HASH counters
-- KEYS[5] m ZSET wake marker
-- KEYS[6..15] r0..r9 LIST id, one per priority level
-- ARGV[1..] two per job, at most 200 jobs: id | token
-- returns answer per job: 1 released, 2 already released by this token, 0 lease lost
-- moves: inflight -> ready | cost O(jobs log inflight)
local owners, jobs, leases, counters, marker = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local ready = {unpack(KEYS, 6, 15)}
local args = ARGV
--@include owner
--@include record
local ids, answers, released, done = {}, {}, 0, {}
for at = 1, #args, 2 do ids[#ids + 1] = args[at] end
local states = redis.call('HMGET', owners, unpack(ids))
local records = redis.call('HMGET', jobs, unpack(ids))
-- backwards: pushed to the head one by one, they come to stand in the order they had
for i = #ids, 1, -1 do
  local id, state, record = ids[i], states[i], records[i]
  local token, deliveries, _, retries, flag = parse_owner(state)
  local fence_and_nonce = string.match(token, ':.*$') or ''
  answers[i] = 0
  if done[id] and token == args[2 * i] then
    -- the same receipt twice in one batch goes back once
    answers[i] = 2
  elseif record and flag == 'h' and token == args[2 * i] then
    answers[i], done[id] = 1, true
    released = released + 1
    redis.call('ZREM', leases, id)
    -- one delivery less, and a flag that ends the token
    redis.call('HSET', owners, id, (deliveries - 1) .. fence_and_nonce .. ' ' .. retries .. ' r')
    redis.call('LPUSH', ready[parse_record(record) + 1], id)
  elseif record and flag == 'r' and (deliveries + 1) .. fence_and_nonce == args[2 * i] then
    answers[i] = 2
  end
end
if released > 0 then
  redis.call('HINCRBY', counters, 'released', released)
  redis.call('ZADD', marker, 0, 'w')
end
return answers
