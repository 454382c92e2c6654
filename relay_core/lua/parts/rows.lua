-- rows: what `list` and `show` tell of a job
-- uses: jobs, owners, errors, whole
-- rows(ids, states, scores): {id, state, score or -1, record or '', delivery state or '', last failure or '', ...}
local function rows(ids, states, scores)
  if #ids == 0 then return {} end
  local records = redis.call('HMGET', jobs, unpack(ids))
  local deliveries = redis.call('HMGET', owners, unpack(ids))
  local failures = redis.call('HMGET', errors, unpack(ids))
  local flat = {}
  for i, id in ipairs(ids) do
    local at = 6 * i - 5
    flat[at], flat[at + 1], flat[at + 2] = id, states[i], tonumber(scores[i]) or -1
    flat[at + 3], flat[at + 4], flat[at + 5] = whole(id, records[i]) or '', deliveries[i] or '', failures[i] or ''
  end
  return flat
end
