-- dedup: a dedup key that is held until its job is done
-- uses: dedup
-- dedup_of(record): the key that the record names, or nil; none where the key is timed
-- free_dedup(id, key): frees the key when this job holds it
-- free_dedup_of(id, record): the same, for the key that the record names
local function dedup_of(record)
  local options = record and string.match(record, '^%d+ %d %d+ ([^\n]*"dedup_key"[^\n]*)\n')
  if not options then return end
  -- without the headers, which stand behind it: in them may be half a surrogate pair, which cjson refuses
  local head = string.match(options, '^(.-),"headers":')
  local fine, parsed = pcall(cjson.decode, head and head .. '}' or options)
  -- a record that a client refuses may hold anything, and has to be buried all the same
  if fine and type(parsed) == 'table' and not parsed.dedup_ms and type(parsed.dedup_key) == 'string' then
    return parsed.dedup_key
  end
end

local function free_dedup(id, key)
  if redis.call('HGET', dedup, key) == id then redis.call('HDEL', dedup, key) end
end

local function free_dedup_of(id, record)
  local key = dedup_of(record)
  if key then free_dedup(id, key) end
end
