-- since: from when this store has declarations. Another answer tells a process that what it had declared is lost
-- uses: time, versions
-- since(): never the same for two stores, nor for one that was emptied in between
local function since()
  redis.call('HSETNX', versions, 'amq.', time[1] .. '.' .. time[2])
  return redis.call('HGET', versions, 'amq.')
end
