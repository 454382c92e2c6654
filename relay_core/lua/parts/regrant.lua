-- regrant: give again what an earlier send of this same claim took, found among the latest 1,000 leases, in its order
-- uses: jobs, owners, leases, nonce, reply
--@include owner
local held = redis.call('ZREVRANGE', leases, 0, 999)
local states_of = #held > 0 and redis.call('HMGET', owners, unpack(held)) or {}
local again = {}
for i, id in ipairs(held) do
  local token, _, mark, retries, flag = parse_owner(states_of[i])
  local record = string.sub(mark, 1, #nonce + 1) == nonce .. 't' and flag == 'h' and redis.call('HGET', jobs, id)
  if record then again[#again + 1] = {id, token, retries, record, tonumber(string.match(token, ':(%d+):'))} end
end
table.sort(again, function(a, b) return a[5] < b[5] end)
for _, job in ipairs(again) do
  local at = #reply
  reply[at + 1], reply[at + 2], reply[at + 3], reply[at + 4] = job[1], job[2], job[3], job[4]
end
