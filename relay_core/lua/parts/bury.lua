-- bury: move a job to dead; the caller has taken it out of its old state
-- uses: now, dead, owners, errors, counters, free_dedup_of
-- bury(id, token, retries, record, flag, reason, message): `flag` is that of parts/owner
local function bury(id, token, retries, record, flag, reason, message)
  redis.call('ZADD', dead, now, id)
  redis.call('HSET', owners, id, token .. ' ' .. retries .. ' ' .. flag)
  redis.call('HSET', errors, id, now .. ' ' .. reason .. '\n' .. message)
  redis.call('HINCRBY', counters, 'dead', 1)
  free_dedup_of(id, record)
end
