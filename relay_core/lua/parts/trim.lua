-- trim: so many receipts are kept, to tell a re-sent enqueue or ack from a new one; plain code, see parts/claim
-- uses: kept (length of `finished` after the new receipts), finished, counters
local FINISHED_KEPT = 10000
if kept > FINISHED_KEPT + 1000 then
  -- `processed` is what was trimmed here and what is still in the list: no counter to write each time
  redis.call('HINCRBY', counters, 'processed', kept - FINISHED_KEPT)
  redis.call('LTRIM', finished, -FINISHED_KEPT, -1)
end
