#!lua flags=allow-oom
-- retell: hand out burials that nobody has told of in time, each to one caller at a time, who tells of them and sends
--   told
-- KEYS[1] c HASH settings
-- KEYS[2] g ZSET id, score = unix ms from which on anybody may tell of its burial; a half: some were told before
-- KEYS[3] x ZSET id, score = time of death, unix ms
-- KEYS[4] j HASH id -> record
-- KEYS[5] o HASH id -> delivery state
-- KEYS[6] y HASH id -> payload, of jobs whose record says that it lies apart
-- ARGV[1] layout version | ARGV[2] most burials to hand out, 1..200
-- returns {id, token, retries, record, 1 if all but some were told before, else 0, ...}, five per job
-- moves: none | cost O(handed out log dead)
local config, untold, dead, jobs, owners, payloads = unpack(KEYS, 1, 6)
local layout, limit = ARGV[1], tonumber(ARGV[2])
local TELL_WITHIN, LONGEST = 30000, 600000 -- ms for which it is left to the caller
--@include clock
--@include owner
--@include whole
local found = redis.call('HGET', config, 'v')
--@include layout
local reply = {}
local notes = redis.call('ZRANGE', untold, '-inf', now, 'BYSCORE', 'LIMIT', 0, limit, 'WITHSCORES')
for i = 1, #notes, 2 do
  local id, again = notes[i], notes[i + 1] % 1
  local died = redis.call('ZSCORE', dead, id)
  local record = died and redis.call('HGET', jobs, id)
  if record then
    local token, _, _, retries = parse_owner(redis.call('HGET', owners, id))
    local at = #reply
    reply[at + 1], reply[at + 2], reply[at + 3], reply[at + 4] = id, token, retries, whole(id, record)
    reply[at + 5] = again > 0 and 1 or 0
    local pause = TELL_WITHIN
    -- who was not ready is told ever less often: after half of the time that has gone by since
    if again > 0 then pause = math.max(pause, math.min(LONGEST, math.floor((now - died) / 2))) end
    redis.call('ZADD', untold, now + pause + again, id)
  else
    -- requeued or dropped by a relay that knows of no burials to tell of
    redis.call('ZREM', untold, id)
  end
end
return reply
