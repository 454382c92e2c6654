-- layout: refuse a store that a newer relay wrote
-- uses: found (the layout of the store, or false), layout (the caller's)
if found and found ~= layout and tonumber(found) > tonumber(layout) then
  return redis.error_reply('RELAY_LAYOUT the queue has layout ' .. found .. ', this relay speaks up to ' .. layout)
end
