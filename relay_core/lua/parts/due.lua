-- due: `due` in the settings is never later than the next delayed job or lease end, so that claims need
-- not look into two sorted sets to learn that nothing is due
-- uses: config
-- lower_due(due, at): the new due; stored, and so true, when `at` is earlier
local function lower_due(due, at)
  if due and due <= at then return due end
  redis.call('HSET', config, 'due', at)
  return at
end
