#!lua flags=allow-oom
-- Makes an empty log with its counters, or (after a loss) starts it again in a later epoch. Run twice it does nothing.
-- KEYS  1 counters  2 stream   ARGV  1 log  2 epoch
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('XGROUP', 'CREATE', KEYS[2], 'das:new', '0', 'MKSTREAM')
  redis.call('XGROUP', 'DESTROY', KEYS[2], 'das:new')
end
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch then redis.call('HSET', KEYS[1], 'epoch', ARGV[2]) end
for _, field in ipairs({'rows', 'bytes', 'first_rows', 'first_bytes', 'repeated_rows'}) do
  redis.call('HSETNX', KEYS[1], ARGV[1] .. '/' .. field, '0')
end
redis.call('HSETNX', KEYS[1], ARGV[1] .. '/last', '-1')
return 1
