-- elsewhere: a job that was claimed before may not be ready although its id lay in a ready list: plain commands that came
--   after their repetition put it there once more
-- uses: leases, delayed, dead
-- elsewhere(id): its score there, or false
local function elsewhere(id)
  return redis.call('ZSCORE', leases, id) or redis.call('ZSCORE', delayed, id) or redis.call('ZSCORE', dead, id)
end
