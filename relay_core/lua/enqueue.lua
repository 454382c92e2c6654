#!lua
-- enqueue: store jobs of one queue partition, ready or delayed; refused as a whole when memory is full
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] s HASH counters
-- KEYS[4] m ZSET wake marker
-- KEYS[5] d ZSET id, score = due time, unix ms
-- KEYS[6] u HASH dedup key -> id
-- KEYS[7] t ZSET dedup key, score = unix ms at which it is free
-- KEYS[8] f LIST ids finished lately
-- KEYS[9] y HASH id -> payload, of jobs whose record says that it lies apart
-- KEYS[10..19] LIST id, the ready lists of the levels that the third argument names, in its order
-- ARGV[1] layout version | ARGV[2] 0, or ms since an earlier send that may have run
-- ARGV[3] the levels of these jobs, a digit each
-- ARGV[4..] four per job, at most 200 jobs: id | due: '' now, '+<ms>' from now, '@<unix ms>' |
--   dedup: '' or '<ms, 0 until done>:<key>' | record without its creation time; its first byte is the level
-- returns {the server's time, unix ms, or 0 where the queue had no job before, answer per job}: 1 stored, now or by the
--   earlier send, 0 that id is another job's, else id that holds the dedup key
-- moves: none -> ready | none -> delayed | cost O(jobs log delayed), re-sent: and O(ids finished lately)
local config, jobs, counters, marker = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local delayed, dedup, dedup_expiry, finished = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local payloads = KEYS[9]
local FIRST_LIST = 9 -- the ready list of the nth digit of `named` is KEYS[FIRST_LIST + n]
local layout, age, named, args = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV
-- ms: what is older than the earlier send by more is not that send's. Clocks, and the way here, may make up less
local LATE = 60000
--@include clock

local set = redis.call('HMGET', config, 'v', 'levels')
local found, levels = set[1], set[2] or ''
--@include layout

local ids, known = {}, {}
for at = 4, #args, 4 do ids[#ids + 1] = args[at] end
-- a lone job without a dedup key is checked by its own write below
if #ids > 1 or age > 0 or args[6] ~= '' then known = redis.call('HMGET', jobs, unpack(ids)) end

local resent, since = age > 0, now - age - LATE
local answers, puts, pushes, stored, seen, duplicates = {set[2] and now or 0}, {}, {}, {}, {}, 0
local apart, wake = {}, false
local born, waits, earliest, past = string.format('%d ', now), nil, nil, nil
for i, id in ipairs(ids) do
  local when, key, record = args[4 * i + 1], args[4 * i + 2], args[4 * i + 3]
  local level, taken, holder, keep = string.sub(record, 1, 1), known[i] or stored[id], nil, nil
  -- of several jobs of one id the first is the one that was stored
  local own = resent and not seen[id] and not (known[i] and tonumber(string.match(known[i], '^%d+')) < since)
  seen[id] = true
  if key ~= '' and not taken then
    keep, key = string.match(key, '^(%d+):(.*)$')
    holder = redis.call('HGET', dedup, key)
    local free_at = holder and redis.call('ZSCORE', dedup_expiry, key)
    if free_at and tonumber(free_at) <= now then holder = nil end
    if holder == id then taken = true end
  end
  if resent and not taken then
    -- a re-send may come after a worker has already finished the job of the first send
    if not past then
      past = {}
      for _, receipt in ipairs(redis.call('LRANGE', finished, 0, -1)) do
        local one, claimed = string.match(receipt, '^(%S+)[^t]*t?(%x*)')
        past[one] = (tonumber(claimed, 16) or now) * 1000
      end
    end
    taken = past[id] and past[id] >= since
  end
  if not taken and not holder then
    if #ids == 1 then
      taken = redis.call('HSETNX', jobs, id, born .. record) == 0
    else
      local n = #puts
      puts[n + 1], puts[n + 2] = id, born .. record
    end
  end
  if taken then
    answers[i + 1] = own and 1 or 0
  elseif holder then
    answers[i + 1] = holder
    duplicates = duplicates + 1
  else
    answers[i + 1] = 1
    stored[id] = true
    if string.find(record, '^%d %d+ {"apart":') then apart[#apart + 1] = id end
    if keep then
      redis.call('HSET', dedup, key, id)
      if keep == '0' then
        redis.call('ZREM', dedup_expiry, key)
      else
        redis.call('ZADD', dedup_expiry, now + tonumber(keep), key)
      end
    end
    local due_at
    if when ~= '' then
      due_at = tonumber(string.sub(when, 2)) + (string.sub(when, 1, 1) == '+' and now or 0)
    end
    if due_at and due_at > now then
      waits = waits or {}
      waits[#waits + 1] = due_at
      waits[#waits + 1] = id
      if not earliest or due_at < earliest then earliest = due_at end
    else
      local list = pushes[level]
      if list then list[#list + 1] = id else pushes[level] = {id} end
    end
  end
  -- of a job that is there, too: plain commands that stored it have only seen that it is missing
  if answers[i + 1] == 1 and not string.find(levels, level, 1, true) then
    wake = wake or taken -- who was woken by those has not looked there
    -- digits of the levels in use, highest first, the order in which claims look
    local sorted = {}
    for digit in string.gmatch(levels .. level, '%d') do sorted[#sorted + 1] = digit end
    table.sort(sorted, function(a, b) return a > b end)
    levels = table.concat(sorted)
    redis.call('HSET', config, 'v', layout, 'levels', levels)
  end
end

if #puts > 0 then redis.call('HSET', jobs, unpack(puts)) end
-- their payloads come with the next commands, each of which keeps what is there: an earlier try may have left another
if #apart > 0 then redis.call('HDEL', payloads, unpack(apart)) end
for level, list in pairs(pushes) do
  redis.call('RPUSH', KEYS[FIRST_LIST + string.find(named, level, 1, true)], unpack(list))
  wake = true
end
if waits then
  redis.call('ZADD', delayed, unpack(waits))
  local due = redis.call('HGET', config, 'due')
  if not due or earliest < tonumber(due) then
    -- one worker must learn that it has to look earlier than it planned
    redis.call('HSET', config, 'due', earliest)
    wake = true
  end
end
if wake then redis.call('ZADD', marker, '0', 'w') end
if duplicates > 0 then redis.call('HINCRBY', counters, 'deduplicated', duplicates) end
if duplicates == 0 and not next(stored) then
  -- WAIT and WAITAOF confirm the last write of their connection: a repeated enqueue needs one to wait for
  redis.call('HSET', config, 'v', layout)
end
return answers
