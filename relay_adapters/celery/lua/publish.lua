#!lua flags=allow-oom
-- publish: put one message into mailboxes; what is too old or too much leaves them, the oldest first
-- KEYS[1] v HASH exchange -> version of its bindings; '' -> how many there were
-- KEYS[2..] b STREAM messages of a queue, one per mailbox
-- ARGV[1] 0, or ms since an earlier send that may have run | ARGV[2] exchange, '' straight to the queue
-- ARGV[3] version of its bindings by which the mailboxes were chosen | ARGV[4] id of the message | ARGV[5] message
-- ARGV[6..] two per mailbox: ms for which a message is kept, 0 no limit | most messages
-- returns {} when the exchange's bindings have changed; else per mailbox: 1 stored, 0 there is no such mailbox
-- moves: none | cost O(mailboxes), re-sent: times 200
local versions = KEYS[1]
local resent, exchange, version, id, message, args = ARGV[1] ~= '0', ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV
local BOXES = 1 -- the nth mailbox is KEYS[BOXES + n]
--@include clock
if exchange ~= '' and (redis.call('HGET', versions, exchange) or '') ~= version then return {} end
local answers = {}
for at = 6, #args, 2 do
  local n = #answers + 1
  local box, keep_ms, there = KEYS[BOXES + n], tonumber(args[at]), false
  if resent then
    for _, entry in ipairs(redis.call('XREVRANGE', box, '+', '-', 'COUNT', 200)) do
      if entry[2][2] == id then there = true break end
    end
  end
  if not there then
    there = redis.call('XADD', box, 'NOMKSTREAM', 'MAXLEN', args[at + 1], '*', 'i', id, 'm', message)
    if there and keep_ms > 0 then redis.call('XTRIM', box, 'MINID', string.format('%.0f', now - keep_ms)) end
  end
  answers[n] = there and 1 or 0
end
return answers
