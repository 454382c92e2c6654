#!lua flags=allow-oom
-- take: take one message out of a mailbox for good
-- KEYS[1] b STREAM messages of a queue
-- ARGV[1] ms for which a message is kept, 0 no limit
-- returns {message}, {} when there is none
-- moves: none | cost O(1)
local box = KEYS[1]
local keep_ms = tonumber(ARGV[1])
--@include clock
if redis.call('EXISTS', box) == 0 then return {} end
if keep_ms > 0 then redis.call('XTRIM', box, 'MINID', string.format('%.0f', now - keep_ms)) end
local found = redis.call('XREADGROUP', 'GROUP', 'q', 'c', 'COUNT', 1, 'NOACK', 'STREAMS', box, '>')
if not found then return {} end
local entry = found[1][2][1]
redis.call('XDEL', box, entry[1])
return {entry[2][4]}
