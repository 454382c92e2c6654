-- spared: whether no queue ends now, though its time be over: who uses it may not have been able to say so
-- uses: now, versions
-- silent(): true when no consumer has told this store anything for longer than there is between two touches of one
-- spared(): true then, and until those who use queues have had their time to say so
local SILENT_MS, SPARED_MS = 30000, 60000
local function silent()
  return now - tonumber(redis.call('HGET', versions, 'amq.told') or now) > SILENT_MS
end
-- spared_until(): that time
-- granted(): true when it was set by the last one who told anything: who publishes sets it once in a silence, which
--   would last for ever where nobody consumes
local function spared_until()
  return tonumber(redis.call('HGET', versions, 'amq.spared') or 0)
end
local function granted()
  return spared_until() == tonumber(redis.call('HGET', versions, 'amq.told') or 0) + SPARED_MS
end
local function spared()
  return silent() or now < spared_until()
end
