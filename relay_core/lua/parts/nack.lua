-- nack: jobs failed, with a check of each token before every write
-- uses: now, config, jobs, payloads, READY, delayed, leases, dead, owners, errors, counters, marker,
--       parse_owner, parse_record, bury
-- nack(from, count): ARGV[from..] = count times id, token, delay ms (-1: dead now), max retries, reason,
--   error, record without its creation time ('': unchanged)
--   answers per job: 1 retried, 2 dead, 3 already nacked by this token, 4 the same, and dead since, 0 lease lost
local function nack(from, count)
  local answers, ids, due = {}, {}, tonumber(redis.call('HGET', config, 'due') or nil)
  for i = 1, count do ids[i] = ARGV[from + 7 * i - 7] end
  local states = redis.call('HMGET', owners, unpack(ids))
  local records = redis.call('HMGET', jobs, unpack(ids))
  local done, wake, retried = {}, false, 0
  for i, id in ipairs(ids) do
    local at = from + 7 * i - 7
    local token, delay, max_retries = ARGV[at + 1], tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
    local reason, message, rewritten = ARGV[at + 4], ARGV[at + 5], ARGV[at + 6]
    local held, _, _, retries, flag = parse_owner(states[i])
    local record = records[i]
    if held ~= token or not record then
      answers[i] = 0
    elseif flag ~= 'h' or done[id] then
      answers[i] = (flag == 'n' or done[id]) and 3 or 0
      if flag == 'n' and redis.call('ZSCORE', dead, id) then answers[i] = 4 end
    else
      done[id] = true
      redis.call('ZREM', leases, id)
      if rewritten ~= '' then
        record = (string.match(record, '^%d+') or now) .. ' ' .. rewritten
        redis.call('HSET', jobs, id, record)
        redis.call('HDEL', payloads, id)
      end
      if delay < 0 or retries >= max_retries then
        bury(id, token, retries, record, 'n', reason, message)
        answers[i] = 2
      else
        redis.call('HSET', owners, id, token .. ' ' .. (retries + 1) .. ' n')
        redis.call('HSET', errors, id, now .. ' retry\n' .. message)
        if delay == 0 then
          redis.call('RPUSH', KEYS[READY + parse_record(record)], id)
          wake = true
        else
          redis.call('ZADD', delayed, now + delay, id)
          if not due or now + delay < due then
            -- one worker must learn that it has to look earlier than it planned
            due = now + delay
            redis.call('HSET', config, 'due', due)
            wake = true
          end
        end
        retried = retried + 1
        answers[i] = 1
      end
    end
  end
  if retried > 0 then redis.call('HINCRBY', counters, 'retried', retried) end
  if wake then redis.call('ZADD', marker, 0, 'w') elseif next(done) and redis.call('HEXISTS', config, 'gate') == 1 then redis.call('ZADD', marker, 0, 'w') end
  return answers
end
