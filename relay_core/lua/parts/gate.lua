-- gate: what the queue's settings allow now; included only where `gate` says that there are any
-- uses: now, config, leases, want, status, hint, tokens, rate (the last five are set)
-- tokens, rate: the bucket before this claim; nil without a rate
local limits = redis.call('HMGET', config, 'paused', 'rate', 'burst', 'max_inflight', 'tokens', 'stamp')
if limits[1] then
  want, status = 0, 1
elseif limits[4] then
  want = math.min(want, tonumber(limits[4]) - redis.call('ZCARD', leases))
  -- an ack wakes the next worker; asking again once a second is for an ack that did not see the limit
  if want < 1 then want, status, hint = 0, 3, 1000 end
end
if limits[2] and want > 0 then
  rate = tonumber(limits[2])
  tokens = tonumber(limits[3])
  if limits[5] then
    local since = tonumber(limits[6])
    if since > now then -- the clock went back, as it may at a failover
      since = now
      redis.call('HSET', config, 'stamp', now)
    end
    tokens = math.min(tokens, tonumber(limits[5]) + (now - since) * rate / 1000)
  end
  if tokens < 1 then
    want, status, hint = 0, 2, math.ceil((1 - tokens) * 1000 / rate)
  else
    want = math.min(want, math.floor(tokens))
  end
end
