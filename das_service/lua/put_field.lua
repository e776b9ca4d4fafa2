#!lua flags=allow-oom
-- Sets one field of a hash, also at maxmemory: beats and notes of attempts must not stop what frees memory.
-- KEYS  1 hash   ARGV  1 field  2 value
return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
