#!lua flags=allow-oom
-- told: burials have been told of, and are not any more
-- KEYS[1] g ZSET id, score = unix ms from which on anybody may tell of its burial
-- KEYS[2] o HASH id -> delivery state
-- ARGV[1..] two per job, at most 200 jobs: id | token of its last holder
-- returns number of burials that are not told of any more; not of jobs that have another token by now
-- moves: none | cost O(jobs log burials)
local untold, owners = KEYS[1], KEYS[2]
local args = ARGV
local settled = 0
for at = 1, #args, 2 do
  local id, token = args[at], args[at + 1]
  -- a job that was requeued since, and buried anew, has yet to be told of
  local state = redis.call('HGET', owners, id)
  if state and string.sub(state, 1, #token + 1) == token .. ' ' then
    settled = settled + redis.call('ZREM', untold, id)
  end
end
return settled
