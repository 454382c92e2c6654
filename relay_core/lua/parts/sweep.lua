-- sweep: promote due jobs, reap expired leases, forget what was kept long enough; at most `limit` of each
-- uses: now, config, jobs, payloads, READY, delayed, leases, dead, owners, errors, dedup, dedup_expiry, counters,
--       untold, parse_owner, parse_record, whole, bury
-- moves: delayed -> ready | inflight -> ready (at the head: it waited longest), or dead past max deliveries
-- set_due(more): writes the exact next due time, which is now where there is more to forget, returns it or nil
-- promote(limit): number promoted
-- reap(limit, max_deliveries, gone): number of leases that had expired; rows of buried jobs go into `gone`
-- forget(limit, keep_ms): drops timed dedup keys that ran out and dead jobs older than keep_ms: number of these jobs, and
--   whether there may be more of either
local function set_due(more)
  local first = more and now or nil
  for _, key in ipairs({delayed, leases}) do
    local at = tonumber(redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2])
    if at and (not first or at < first) then first = at end
  end
  if first then redis.call('HSET', config, 'due', first) else redis.call('HDEL', config, 'due') end
  return first
end

local function promote(limit)
  local ids = redis.call('ZRANGE', delayed, '-inf', now, 'BYSCORE', 'LIMIT', 0, limit)
  if #ids == 0 then return 0 end
  local records = redis.call('HMGET', jobs, unpack(ids))
  redis.call('ZREM', delayed, unpack(ids))
  local promoted = 0
  for i, id in ipairs(ids) do
    if records[i] then
      redis.call('RPUSH', KEYS[READY + parse_record(records[i])], id)
      promoted = promoted + 1
    end
  end
  if promoted > 0 then redis.call('HINCRBY', counters, 'promoted', promoted) end
  return promoted
end

local function reap(limit, max_deliveries, gone)
  local ids = redis.call('ZRANGE', leases, '-inf', now, 'BYSCORE', 'LIMIT', 0, limit)
  if #ids == 0 then return 0 end
  local records = redis.call('HMGET', jobs, unpack(ids))
  local states = redis.call('HMGET', owners, unpack(ids))
  redis.call('ZREM', leases, unpack(ids))
  local reaped = 0
  for i = #ids, 1, -1 do
    local id, record = ids[i], records[i]
    if record then
      local token, deliveries, _, retries = parse_owner(states[i])
      local level, own_max = parse_record(record)
      if deliveries - retries >= (own_max > 0 and own_max or max_deliveries) then
        local told = 'delivered ' .. (deliveries - retries) .. ' times without an answer'
        bury(id, token, retries, record, 'r', 'max_deliveries', told)
        --@include note
        gone[#gone + 1] = id
        gone[#gone + 1] = token
        gone[#gone + 1] = retries
        gone[#gone + 1] = whole(id, record)
      else
        redis.call('HSET', owners, id, token .. ' ' .. retries .. ' r')
        redis.call('LPUSH', KEYS[READY + level], id)
      end
      reaped = reaped + 1
    end
  end
  if reaped > 0 then redis.call('HINCRBY', counters, 'reaped', reaped) end
  return reaped
end

local function forget(limit, keep_ms)
  local keys = redis.call('ZRANGE', dedup_expiry, '-inf', now, 'BYSCORE', 'LIMIT', 0, limit)
  if #keys > 0 then
    redis.call('HDEL', dedup, unpack(keys))
    redis.call('ZREM', dedup_expiry, unpack(keys))
  end
  local ids = redis.call('ZRANGE', dead, '-inf', now - keep_ms, 'BYSCORE', 'LIMIT', 0, limit)
  if #ids > 0 then
    redis.call('HDEL', jobs, unpack(ids))
    redis.call('HDEL', payloads, unpack(ids))
    redis.call('HDEL', owners, unpack(ids))
    redis.call('HDEL', errors, unpack(ids))
    redis.call('ZREM', dead, unpack(ids))
    redis.call('ZREM', untold, unpack(ids))
    redis.call('HINCRBY', counters, 'forgotten', #ids)
  end
  return #ids, #keys == limit or #ids == limit
end
