-- claiming: the claim that `claim` and `finish` share
-- uses: now, config, marker, ready, and all of sweep and take
-- claiming(o): o = {layout, want, lease_ms, nonce, max_deliveries, keep_ms, woken, resent}
-- returns {status, hint ms, now, promoted, reaped, buried rows, id, token, retries, record, ...}
--   status 0 free, 1 paused, 2 rate, 3 max_inflight; hint: ms until asking again makes sense, -1 unknown;
--   buried rows: flat {id, token, retries, record, ...} of jobs that went to dead here
local function claiming(o)
  local set = redis.call('HMGET', config, 'v', 'levels', 'due', 'gate')
  local refused = check_layout(set[1], o.layout)
  if refused then return refused end
  local levels, due = set[2] or '', tonumber(set[3])
  local gone, promoted, reaped = {}, 0, 0
  if due and due <= now then
    promoted = promote(200)
    reaped = reap(200, o.max_deliveries, gone)
    forget(50, o.keep_ms)
    due = set_due()
  end
  local reply = {0, -1, now, promoted, reaped, gone}
  if o.resent then regrant(o.nonce, reply) end
  local want, status, hint, spend = o.want, 0, -1, nil
  if #reply > 6 then want = 0 end
  if set[4] and want > 0 then want, status, hint, spend = gate(want) end
  local taken = 0
  if want > 0 then
    taken, due = take(want, o.lease_ms, o.nonce, o.max_deliveries, levels, due, reply, gone)
    if spend and taken > 0 then spend(taken) end
  end
  if (o.woken or promoted + reaped > 0) and status == 0 then
    -- who took the marker puts it back while work remains: wakes chain, no herd
    for i = 1, #levels do
      if redis.call('LLEN', ready[string.byte(levels, i) - 47]) > 0 then
        redis.call('ZADD', marker, 0, 'w')
        break
      end
    end
  end
  if hint < 0 then
    if taken > 0 and #reply == 6 then hint = 0 elseif due then hint = math.max(0, due - now) end
  end
  reply[1], reply[2] = status, hint
  return reply
end
