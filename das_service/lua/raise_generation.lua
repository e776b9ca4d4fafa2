#!lua flags=allow-oom
-- Raises an FM's generation in a partition, so that a withdrawn snapshot can't publish there; never lowers it.
-- KEYS  1 generation   ARGV  1 the registry's generation
local stored = redis.call('GET', KEYS[1])
if not stored or tonumber(stored) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
return 1
