#!lua flags=allow-oom
-- Gives an FM its place in a partition's log, once: its group, where it starts, its generation.
-- KEYS  1 counters  2 stream  3 generation
-- ARGV  1 group  2 fm  3 log  4 position to start after, or $  5 where the FM began, or '' for the log's next entry
local start = 'start:' .. ARGV[2] .. ':' .. ARGV[3]
if ARGV[5] ~= '' then redis.call('HSETNX', KEYS[1], start, ARGV[5]) end
for _, g in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
  if g[2] == ARGV[1] then return 0 end
end
redis.call('XGROUP', 'CREATE', KEYS[2], ARGV[1], ARGV[4])
redis.call('HSETNX', KEYS[1], start,
  redis.call('HGET', KEYS[1], 'epoch') .. '-' .. (tonumber(redis.call('HGET', KEYS[1], ARGV[3] .. '/last')) + 1))
redis.call('SET', KEYS[3], '0', 'NX')
return 1
