#!lua
-- adopt: take in jobs of another queue system, each in its state and with its own times; refused as a whole when
--   memory is full
-- KEYS[1] c HASH settings
-- KEYS[2] j HASH id -> record
-- KEYS[3] s HASH counters
-- KEYS[4] m ZSET wake marker
-- KEYS[5] d ZSET id, score = due time, unix ms
-- KEYS[6] x ZSET id, score = time of death, unix ms
-- KEYS[7] e HASH id -> last failure
-- KEYS[8] f LIST ids finished lately
-- KEYS[9..18] r0..r9 LIST id, one per priority level
-- ARGV[1] layout version
-- ARGV[2..] seven per job, at most 200 jobs: id | state: ready, delayed or dead | unix ms: when due, when it died |
--   creation time, unix ms, or '' for now | reason of the death | its error | record without its creation time
-- returns answer per job: 1 taken in, 0 that id is stored, or was finished lately
-- moves: none -> ready | none -> delayed | none -> dead | cost O(jobs log delayed, and ids finished lately)
local config, jobs, counters, marker, delayed, dead, errors, finished = unpack(KEYS, 1, 8)
local ready = {unpack(KEYS, 9, 18)}
local layout, args = ARGV[1], ARGV
--@include clock
--@include record
local set = redis.call('HMGET', config, 'v', 'levels', 'due')
local found, levels, due = set[1], set[2] or '', tonumber(set[3] or nil)
--@include layout

-- who takes jobs in may have been killed before it could take them out of where they were: then they come again
local past = {}
for _, receipt in ipairs(redis.call('LRANGE', finished, 0, -1)) do past[string.match(receipt, '^%S+')] = true end

local answers, wake, died, earliest = {}, false, 0, due
for at = 2, #args, 7 do
  local id, state, moment, created = args[at], args[at + 1], tonumber(args[at + 2]), args[at + 3]
  local record = (created == '' and now or created) .. ' ' .. args[at + 6]
  local answer = 0
  if not past[id] and redis.call('HSETNX', jobs, id, record) == 1 then
    answer = 1
    local level = parse_record(record)
    if state == 'dead' then
      redis.call('ZADD', dead, moment, id)
      redis.call('HSET', errors, id, string.format('%.0f', moment) .. ' ' .. args[at + 4] .. '\n' .. args[at + 5])
      died = died + 1
    elseif state == 'delayed' and moment > now then
      redis.call('ZADD', delayed, moment, id)
      if not earliest or moment < earliest then earliest = moment end
    else
      redis.call('RPUSH', ready[level + 1], id)
      wake = true
    end
    if not string.find(levels, level, 1, true) then
      -- digits of the levels in use, highest first, the order in which claims look
      local sorted = {}
      for digit in string.gmatch(levels .. level, '%d') do sorted[#sorted + 1] = digit end
      table.sort(sorted, function(a, b) return a > b end)
      levels = table.concat(sorted)
    end
  end
  answers[#answers + 1] = answer
end
-- written also when nothing was new: WAIT and WAITAOF confirm the last write of their connection
redis.call('HSET', config, 'v', layout)
if levels ~= '' then redis.call('HSET', config, 'levels', levels) end
if died > 0 then redis.call('HINCRBY', counters, 'dead', died) end
if earliest and earliest ~= due then
  -- one worker must learn that it has to look earlier than it planned
  redis.call('HSET', config, 'due', string.format('%.0f', earliest))
  wake = true
end
if wake then redis.call('ZADD', marker, '0', 'w') end
return answers
