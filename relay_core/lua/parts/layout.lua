-- layout: refuse a store that a newer relay wrote
-- check_layout(found, mine): an error reply, or nil when this client may go on
local function check_layout(found, mine)
  if found and found ~= mine and tonumber(found) > tonumber(mine) then
    return redis.error_reply('RELAY_LAYOUT the queue has layout ' .. found .. ', this relay speaks up to ' .. mine)
  end
end
