#!lua flags=allow-oom
-- Takes entries over from a consumer that is dead, and forgets it when it holds none. Only what is still its own moves.
-- KEYS  1 stream   ARGV  1 group  2 dead consumer  3 new consumer  4 most entries
-- Gives the entries as XCLAIM does
local held = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[4], ARGV[2])
if #held == 0 then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
  return {}
end
local ids = {}
for i, entry in ipairs(held) do ids[i] = entry[1] end
return redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, unpack(ids))
