-- ack: jobs are done, with a check of each token before every write
-- uses: jobs, payloads, leases, owners, errors, dedup, counters, marker, finished
-- ack(from, count): ARGV[from..] = count times id, token, dedup key or ''
--   answers per job: 1 done, 2 already done by this token, 0 lease lost
local function ack(from, count)
  local answers, ids, done, past, failed, gated = {}, {}, {}, {}, nil, false
  for i = 1, count do ids[i] = ARGV[from + 3 * i - 3] end
  local states = redis.call('HMGET', owners, unpack(ids))
  for i, id in ipairs(ids) do
    local token, state = ARGV[from + 3 * i - 2], states[i]
    local receipt = id .. ' ' .. token
    local first_try = state == token .. ' 0 h'
    local held = first_try or (state and string.sub(state, 1, #token + 1) == token .. ' ' and string.sub(state, -1) == 'h')
    if held and not done[id] then
      answers[i] = 1
      -- by name too: the same receipt twice in one batch counts once
      done[#done + 1], done[id] = id, token
      past[#past + 1] = receipt
      if string.byte(token, -1) == 103 then gated = true end -- 'g', see parts/claim
      if not first_try then
        failed = failed or {}
        failed[#failed + 1] = id
      end
      local key = ARGV[from + 3 * i - 1]
      if key ~= '' and redis.call('HGET', dedup, key) == id then redis.call('HDEL', dedup, key) end
    elseif done[id] == token or redis.call('LPOS', finished, receipt) then
      answers[i] = 2
    else
      answers[i] = 0
    end
  end
  if #done > 0 then
    redis.call('HDEL', jobs, unpack(done))
    redis.call('HDEL', payloads, unpack(done))
    redis.call('HDEL', owners, unpack(done))
    redis.call('ZREM', leases, unpack(done))
    if failed then redis.call('HDEL', errors, unpack(failed)) end
    local kept = redis.call('RPUSH', finished, unpack(past))
    --@include trim
    -- a worker that max_inflight held back may go on
    if gated then redis.call('ZADD', marker, 0, 'w') end
  end
  return answers
end
