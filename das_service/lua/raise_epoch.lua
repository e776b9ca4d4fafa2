#!lua flags=allow-oom
-- Begins a later epoch of a partition's logs: sequence numbers start again from 0, what the logs hold stays.
-- KEYS  1 counters   ARGV  1 epoch  2.. logs
redis.call('HSET', KEYS[1], 'epoch', ARGV[1])
for i = 2, #ARGV do redis.call('HSET', KEYS[1], ARGV[i] .. '/last', '-1') end
return 1
