-- regrant: give again what an earlier send of this same claim took, found among the latest 1,000 leases
-- uses: jobs, owners, leases, nonce, reply
--@include owner
local held = redis.call('ZREVRANGE', leases, 0, 999)
local states_of = #held > 0 and redis.call('HMGET', owners, unpack(held)) or {}
for i, id in ipairs(held) do
  local token, _, mark, retries, flag = parse_owner(states_of[i])
  local record = string.sub(mark, 1, #nonce + 1) == nonce .. 't' and flag == 'h' and redis.call('HGET', jobs, id)
  if record then
    local at = #reply
    reply[at + 1], reply[at + 2], reply[at + 3], reply[at + 4] = id, token, retries, record
  end
end
