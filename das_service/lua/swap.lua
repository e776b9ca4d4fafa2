#!lua flags=allow-oom
-- Changes one record of the registry if it still reads as the caller saw it, and notes who did it.
-- KEYS  1 registry   ARGV  1 field  2 what it read ('' = absent)  3 what it shall read ('' = deleted)
--       4 prefix of the audit log's fields (none: no entry)  5 its entry  6 how many are kept
-- Gives the registry's new revision, or -1 if somebody else changed the record
local seen = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if seen ~= ARGV[2] then return -1 end
if ARGV[3] == '' then redis.call('HDEL', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end
if ARGV[4] and ARGV[4] ~= '' then
  local number = redis.call('HINCRBY', KEYS[1], ARGV[4] .. 'last', 1)
  redis.call('HSET', KEYS[1], ARGV[4] .. string.format('%.0f', number), ARGV[5])
  redis.call('HDEL', KEYS[1], ARGV[4] .. string.format('%.0f', number - tonumber(ARGV[6])))
end
return redis.call('HINCRBY', KEYS[1], 'revision', 1)
