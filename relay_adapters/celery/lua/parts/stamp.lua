-- stamp: a new version for an exchange whose bindings change
-- uses: now, versions
-- stamp(): with the time in it, so that a store that was emptied never comes to an old version again
local function stamp()
  return string.format('%.0f-%.0f', now, redis.call('HINCRBY', versions, '', 1))
end
