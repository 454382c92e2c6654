-- ack: jobs are done, with a check of each token before every write
-- uses: config, jobs, leases, owners, errors, dedup, counters, marker, finished, free_dedup
-- ack(from, count): ARGV[from..] = count times id, token, dedup key or ''
--   answers per job: 1 done, 2 already done by this token, 0 lease lost
--@include gated
-- so many receipts are remembered, to tell a re-sent enqueue or ack from a new one
local FINISHED_KEPT = 10000

local function ack(from, count)
  local answers, ids, past, tokens = {}, {}, {}, {}
  for i = 1, count do ids[i] = ARGV[from + 3 * i - 3] end
  local states = redis.call('HMGET', owners, unpack(ids))
  local done, failed = {}, {}
  for i, id in ipairs(ids) do
    local token, state = ARGV[from + 3 * i - 2], states[i]
    local _, _, retries = string.find(state or '', ' (%d+) h$')
    -- tokens[id]: the same receipt twice in one batch counts once
    if retries and not tokens[id] and string.sub(state, 1, #token + 1) == token .. ' ' then
      answers[i] = 1
      tokens[id] = token
      done[#done + 1] = id
      past[#past + 1] = id .. ' ' .. token
      if retries ~= '0' then failed[#failed + 1] = id end
      local key = ARGV[from + 3 * i - 1]
      if key ~= '' then free_dedup(id, key) end
    elseif tokens[id] == token or redis.call('LPOS', finished, id .. ' ' .. token) then
      answers[i] = 2
    else
      answers[i] = 0
    end
  end
  if #done > 0 then
    redis.call('HDEL', jobs, unpack(done))
    redis.call('HDEL', owners, unpack(done))
    redis.call('ZREM', leases, unpack(done))
    if #failed > 0 then redis.call('HDEL', errors, unpack(failed)) end
    redis.call('RPUSH', finished, unpack(past))
    local processed = redis.call('HINCRBY', counters, 'processed', #done)
    if processed % 1000 < #done then redis.call('LTRIM', finished, -FINISHED_KEPT, -1) end
    wake_gated()
  end
  return answers
end
