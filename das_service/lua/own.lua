#!lua flags=allow-oom
-- Takes a role that only one process may play if it is free or its owner is the dead one that the caller names.
-- KEYS  1 owner   ARGV  1 instance  2 dead instance or ''
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] and owner ~= ARGV[2] then return owner end
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
