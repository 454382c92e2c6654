-- record: what scripts read of a record's header, `<created ms> <level> <max deliveries> <options>\n<payload>`
-- parse_record(record): its level (0..9), its own max deliveries (0: the caller's default)
local function parse_record(record)
  local level, max_deliveries = string.match(record, '^%d+ (%d) (%d+) ')
  return tonumber(level) or 0, tonumber(max_deliveries) or 0
end
