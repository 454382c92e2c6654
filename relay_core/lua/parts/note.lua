-- note: a burial that its caller did not ask for, so that it is told of by another one where the caller does not live to
--   do so; plain code, see parts/claim
-- uses: now, untold, id
local TELL_WITHIN = 30000 -- ms for which it is left to the caller
local NOTES_KEPT = 10000 -- where nobody wants to be told, they are as many at most
redis.call('ZADD', untold, now + TELL_WITHIN, id)
if redis.call('ZCARD', untold) > NOTES_KEPT then redis.call('ZPOPMIN', untold) end
