#!lua flags=allow-oom,no-writes
-- scan: a page of the dead jobs from a point in time on, bounded by number and by bytes
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] x ZSET id, score = time of death, unix ms
-- KEYS[4] o HASH id -> delivery state
-- KEYS[5] e HASH id -> last failure
-- KEYS[6] y HASH id -> payload, of jobs whose record says that it lies apart
-- ARGV[1] layout version | ARGV[2] unix ms, where the page begins | ARGV[3] id: the page begins after it, ''
-- ARGV[4] unix ms, where the page ends at the latest | ARGV[5] most jobs to return, 1..200
-- ARGV[6] bytes of records after which the page ends | ARGV[7] 1: return the records, 0: ''
-- returns {dead jobs from here on, six per job as `list` does, ...}; no jobs: there are no more
-- moves: none | cost O(log dead squared + returned)
local config, jobs, dead, owners, errors, payloads = unpack(KEYS, 1, 6)
local layout, from, after, last = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local limit, most_bytes, with_records = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7] == '1'
--@include whole
local found = redis.call('HGET', config, 'v')
--@include layout
-- as the server orders members: byte by byte, which `<` does not, for it goes by the locale
local function is_after(id)
  for at = 1, math.min(#id, #after) do
    local one, other = string.byte(id, at), string.byte(after, at)
    if one ~= other then return one > other end
  end
  return #id > #after
end
-- the first rank beyond the point, whether or not the job that it names is still there
local total = redis.call('ZCARD', dead)
local low, high = 0, total
while low < high do
  local middle = math.floor((low + high) / 2)
  local entry = redis.call('ZRANGE', dead, middle, middle, 'WITHSCORES')
  local score = tonumber(entry[2])
  if score > from or (score == from and is_after(entry[1])) then high = middle else low = middle + 1 end
end
local page = redis.call('ZRANGE', dead, low, low + limit - 1, 'WITHSCORES')
local flat, bytes = {total - low}, 0
for i = 1, #page, 2 do
  local id, score = page[i], tonumber(page[i + 1])
  if score > last then break end
  local record = ''
  if with_records then
    bytes = bytes + redis.call('HSTRLEN', jobs, id) + redis.call('HSTRLEN', payloads, id)
    if bytes > most_bytes and #flat > 1 then break end
    record = whole(id, redis.call('HGET', jobs, id)) or ''
  end
  local at = #flat
  flat[at + 1], flat[at + 2], flat[at + 3], flat[at + 4] = id, 'dead', score, record
  flat[at + 5] = redis.call('HGET', owners, id) or ''
  flat[at + 6] = redis.call('HGET', errors, id) or ''
end
return flat
