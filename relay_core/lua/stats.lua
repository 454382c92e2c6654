#!lua flags=allow-oom,no-writes
-- stats: depths, settings and counters of one queue partition, all at one instant
-- KEYS[1] c HASH settings
-- KEYS[2] s HASH counters
-- KEYS[3] d ZSET id, score = due time, unix ms
-- KEYS[4] l ZSET id, score = lease deadline, unix ms
-- KEYS[5] x ZSET id, score = time of death, unix ms
-- KEYS[6] j HASH id -> record
-- KEYS[7] f LIST receipts of the latest acks
-- KEYS[8..17] r0..r9 LIST id, one per priority level
-- ARGV[1] layout version
-- returns {now, delayed, inflight, dead, since when the oldest ready job has been ready or -1, the same of the
--   one that has waited longer than 99 in 100 or -1, next due time or -1,
--   settings as name, value, ..., counters as name, value, ..., ready jobs of level 0, ..., of level 9}
-- moves: none | cost O(ready / 100)
local config, counters, delayed, leases, dead, jobs, finished = unpack(KEYS, 1, 7)
local ready = {unpack(KEYS, 8, 17)}
local layout = ARGV[1]
--@include clock
local found = redis.call('HGET', config, 'v')
--@include layout
-- since when a job has been ready, or nil
local function ready_since(id)
  local created, options = string.match(redis.call('HGET', jobs, id) or '', '^(%d+) %d %d+ ([^\n]*)')
  created = tonumber(created)
  if created and options ~= '' then
    -- a job that was to wait has waited for a worker only since it was due
    local delay, at = string.match(options, '"delay_ms":(%d+)'), string.match(options, '"at_ms":(%d+)')
    if delay then created = created + delay elseif at then created = math.max(created, tonumber(at)) end
  end
  return created
end
local oldest, patient, lengths = nil, nil, {}
for level = 1, 10 do
  lengths[level] = redis.call('LLEN', ready[level])
  if lengths[level] > 0 then
    local since = ready_since(redis.call('LINDEX', ready[level], 0))
    if since and (not oldest or since < oldest) then oldest = since end
    -- one in a hundred of this level has waited longer than this one
    local rank = math.floor(lengths[level] / 100)
    if rank > 0 then since = ready_since(redis.call('LINDEX', ready[level], rank)) end
    if since and (not patient or since < patient) then patient = since end
  end
end
-- two counters follow from the rest, so that the moves of every job need not write them: see parts/ack, and
-- every job that was ever enqueued is still there or has left in one of the counted ways
local count = {enqueued = redis.call('HLEN', jobs), processed = redis.call('LLEN', finished)}
local flat = redis.call('HGETALL', counters)
for i = 1, #flat, 2 do count[flat[i]] = (count[flat[i]] or 0) + tonumber(flat[i + 1]) end
for _, way in ipairs({'processed', 'cancelled', 'purged', 'forgotten'}) do
  count.enqueued = count.enqueued + (count[way] or 0)
end
local counted = {}
for name, value in pairs(count) do
  if value > 0 then
    counted[#counted + 1] = name
    counted[#counted + 1] = string.format('%.0f', value)
  end
end
return {
  now, redis.call('ZCARD', delayed), redis.call('ZCARD', leases), redis.call('ZCARD', dead), oldest or -1,
  patient or -1, tonumber(redis.call('ZRANGE', delayed, 0, 0, 'WITHSCORES')[2]) or -1,
  redis.call('HGETALL', config), counted, unpack(lengths),
}
