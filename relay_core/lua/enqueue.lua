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
-- KEYS[9..18] r0..r9 LIST id, one per priority level
-- ARGV[1] layout version | ARGV[2] 1 when an earlier send may have run
-- ARGV[3..] six per job, at most 200 jobs: id | level 0..9 | due: '' now, '+<ms>' from now, '@<unix ms>' |
--   dedup key or '' | dedup ms, 0 until done | record without its creation time
-- returns {now, answer per job}: 1 stored, 0 that id is stored (re-sent: or finished), else id that holds the dedup key
-- moves: none -> ready | none -> delayed | cost O(jobs log delayed)
local config, jobs, counters, marker = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local delayed, dedup, dedup_expiry, finished = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local ready = {unpack(KEYS, 9, 18)}
local layout, resent, args = ARGV[1], ARGV[2] == '1', ARGV
--@include clock
--@include layout
--@include due

local set = redis.call('HMGET', config, 'v', 'levels', 'due')
local refused = check_layout(set[1], layout)
if refused then return refused end
local levels, due = set[2] or '', tonumber(set[3])

local ids = {}
for at = 3, #args, 6 do ids[#ids + 1] = args[at] end
local known = redis.call('HMGET', jobs, unpack(ids))

-- a re-send may come after a worker has already finished the job of the first send
local function finished_lately(id)
  for _, receipt in ipairs(redis.call('LRANGE', finished, 0, -1)) do
    if string.sub(receipt, 1, #id + 1) == id .. ' ' then return true end
  end
end

local function holder_of(key, id)
  local holder = redis.call('HGET', dedup, key)
  if not holder then return end
  local free_at = tonumber(redis.call('ZSCORE', dedup_expiry, key) or nil)
  if not (free_at and free_at <= now) then return holder end
end

local answers, puts, pushes, waits, seen, duplicates = {now}, {}, {}, {}, {}, 0
local wake, earliest = false, nil
for i, id in ipairs(ids) do
  local at = 3 * (2 * i - 1)
  local level, when, key = args[at + 1], args[at + 2], args[at + 3]
  local holder = key ~= '' and holder_of(key, id)
  if known[i] or seen[id] or holder == id or (resent and finished_lately(id)) then
    answers[i + 1] = 0
  elseif holder then
    answers[i + 1] = holder
    duplicates = duplicates + 1
  else
    answers[i + 1] = 1
    seen[id] = true
    puts[#puts + 1] = id
    puts[#puts + 1] = now .. ' ' .. args[at + 5]
    if key ~= '' then
      local keep = tonumber(args[at + 4])
      redis.call('HSET', dedup, key, id)
      if keep > 0 then redis.call('ZADD', dedup_expiry, now + keep, key) else redis.call('ZREM', dedup_expiry, key) end
    end
    local due_at = now
    if when ~= '' then
      due_at = tonumber(string.sub(when, 2)) + (string.sub(when, 1, 1) == '+' and now or 0)
    end
    if due_at > now then
      waits[#waits + 1] = due_at
      waits[#waits + 1] = id
      if not earliest or due_at < earliest then earliest = due_at end
    else
      local list = pushes[level]
      if not list then
        list = {}
        pushes[level] = list
      end
      list[#list + 1] = id
      wake = true
    end
    if not string.find(levels, level, 1, true) then
      -- digits of the levels in use, highest first, the order in which claims look
      local sorted = {}
      for digit in string.gmatch(levels .. level, '%d') do sorted[#sorted + 1] = digit end
      table.sort(sorted, function(a, b) return a > b end)
      levels = table.concat(sorted)
      redis.call('HSET', config, 'v', layout, 'levels', levels)
    end
  end
end

if #puts > 0 then
  redis.call('HSET', jobs, unpack(puts))
  for level, list in pairs(pushes) do redis.call('RPUSH', ready[level + 1], unpack(list)) end
  if earliest then
    redis.call('ZADD', delayed, unpack(waits))
    if not due or earliest < due then
      -- one worker must learn that it has to look earlier than it planned
      lower_due(due, earliest)
      wake = true
    end
  end
  redis.call('HINCRBY', counters, 'enqueued', #puts / 2)
  if wake then redis.call('ZADD', marker, 0, 'w') end
end
if duplicates > 0 then redis.call('HINCRBY', counters, 'deduplicated', duplicates) end
return answers
