-- done: jobs that were found to be held by the states that are given leave the store
-- uses: args (a state per job from items_from on, then ids_from..ids_to, an id per job), items_from, ids_from, ids_to,
--   jobs, owners, leases, finished, counters
redis.call('HDEL', jobs, unpack(args, ids_from, ids_to))
redis.call('HDEL', owners, unpack(args, ids_from, ids_to))
redis.call('ZREM', leases, unpack(args, ids_from, ids_to))
-- a receipt is id and token: the state without its last four bytes
for at = ids_from, ids_to do args[at] = args[at] .. ' ' .. string.sub(args[at - ids_from + items_from], 1, -5) end
local kept = redis.call('RPUSH', finished, unpack(args, ids_from, ids_to))
--@include trim
