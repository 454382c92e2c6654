-- gated: after a lease ended, a worker held back by max_inflight may go on
-- uses: config, marker
local function wake_gated()
  if redis.call('HEXISTS', config, 'gate') == 1 then redis.call('ZADD', marker, 0, 'w') end
end
