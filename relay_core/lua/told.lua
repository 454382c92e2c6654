#!lua flags=allow-oom
-- told: burials have been told of, and are not any more; or they are told of again, to those who were not ready for it
-- KEYS[1] g ZSET id, score = unix ms from which on anybody may tell of its burial
-- KEYS[2] o HASH id -> delivery state
-- ARGV[1] 1: everybody was told; 0: all but those who said that they cannot do their part yet
-- ARGV[2..] two per job, at most 200 jobs: id | token of its last holder
-- returns number of burials of which this is news; not of jobs that have another token by now
-- moves: none | cost O(jobs log burials)
local untold, owners = KEYS[1], KEYS[2]
local by_all, args = ARGV[1] == '1', ARGV
local settled = 0
for at = 2, #args, 2 do
  local id, token = args[at], args[at + 1]
  -- a job that was requeued since, and buried anew, has yet to be told of
  local state = redis.call('HGET', owners, id)
  if state and string.sub(state, 1, #token + 1) == token .. ' ' then
    if by_all then
      settled = settled + redis.call('ZREM', untold, id)
    else
      -- a half of a ms is the mark; who was quick to do its part after all has taken the note away
      local due = redis.call('ZSCORE', untold, id)
      if due and due % 1 == 0 then
        settled = settled + redis.call('ZADD', untold, 'CH', due + 0.5, id)
      end
    end
  end
end
return settled
