-- owner: a job's delivery state, `<deliveries>:<fence>:<nonce> <retries> <flag>`; the nonce is the caller's, a t, the time
--   of the claim in unix seconds, hexadecimal, and a g under limits
-- flag h: held by a lease; n: its holder nacked it; r: taken from its holder, or handed back
-- parse_owner(text): token, deliveries, nonce, retries, flag; zeros for a job that was never claimed
local function parse_owner(text)
  if not text then return '', 0, '', 0, 'r' end
  local token, deliveries, nonce, retries, flag = string.match(text, '^((%d+):%d+:(%w*)) (%d+) (%a)$')
  return token or '', tonumber(deliveries) or 0, nonce or '', tonumber(retries) or 0, flag or 'r'
end
