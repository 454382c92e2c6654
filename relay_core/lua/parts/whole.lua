-- whole: a record with its payload, also where that lies apart
-- uses: payloads
-- lies_apart(record): whether the record's payload does; false where there is no record
-- whole(id, record): the record, followed by its payload
local function lies_apart(record)
  return record and string.find(record, '^%d+ %d %d+ {"apart":') and true or false
end

local function whole(id, record)
  return lies_apart(record) and record .. (redis.call('HGET', payloads, id) or '') or record
end
