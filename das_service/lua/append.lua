#!lua
-- Appends one chunk to a log of a partition, once.
-- KEYS  1 counters  2 stream  3 mark of the chunk's content
-- ARGV  1 log  2 epoch  3 last committed seq  4 most bytes kept  5 seconds the mark lives  6 data  7 rows  8.. head
-- Gives {what, detail}: OK seq | SEEN seq | LOST | EPOCH epoch | REWOUND seq | BACKLOG bytes
local log, epoch, data = ARGV[1], ARGV[2], ARGV[6]
local c = redis.call('HMGET', KEYS[1], 'epoch', log .. '/last', log .. '/rows', log .. '/bytes', log .. '/first_bytes')
if not c[1] or not c[2] then return {'LOST', ''} end
if c[1] ~= epoch then return {'EPOCH', c[1]} end
if tonumber(c[2]) < tonumber(ARGV[3]) then return {'REWOUND', c[2]} end
local seen = redis.call('GET', KEYS[3])
if seen then
  local seen_epoch, seq = string.match(seen, '^(%d+)-(%d+)$')
  if seen_epoch == epoch then
    redis.call('HINCRBY', KEYS[1], log .. '/repeated_rows', ARGV[7])
    return {'SEEN', seq}
  end
end
local rows = string.format('%.0f', tonumber(c[3]) + tonumber(ARGV[7]))
local bytes = string.format('%.0f', tonumber(c[4]) + #data)
if tonumber(bytes) - tonumber(c[5]) > tonumber(ARGV[4]) and c[4] ~= c[5] then
  return {'BACKLOG', string.format('%.0f', tonumber(c[4]) - tonumber(c[5]))}
end
local now = redis.call('TIME')
local fields = {'t', now[1] .. string.format('%06d', now[2]), 'r', rows, 'b', bytes, 'd', data}
for i = 8, #ARGV do fields[#fields + 1] = ARGV[i] end
local id = redis.call('XADD', KEYS[2], 'NOMKSTREAM', epoch .. '-*', unpack(fields))
if not id then return {'LOST', ''} end
local seq = string.match(id, '-(%d+)$')
redis.call('SET', KEYS[3], id, 'EX', ARGV[5])
redis.call('HSET', KEYS[1], log .. '/last', seq, log .. '/rows', rows, log .. '/bytes', bytes)
return {'OK', seq}
