#!lua flags=allow-oom
-- tidy: payloads that were sent with an enqueue leave the store where the enqueue did not take their jobs
-- KEYS[1] j HASH id -> record
-- KEYS[2] y HASH id -> payload, of jobs whose record says that it lies apart
-- ARGV[1..] at most 200 ids
-- returns number of payloads dropped
-- moves: none | cost O(ids)
local jobs, payloads, ids = KEYS[1], KEYS[2], {unpack(ARGV, 1)}
--@include whole
local stray = {}
for i, record in ipairs(redis.call('HMGET', jobs, unpack(ids))) do
  if not lies_apart(record) then stray[#stray + 1] = ids[i] end
end
return #stray > 0 and redis.call('HDEL', payloads, unpack(stray)) or 0
