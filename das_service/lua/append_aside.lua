#!lua
-- Appends what a shadow or a backfill said of rows to the scored log. They are nobody's outcome: not counted as rows.
-- KEYS  1 scored stream  2 counters  3 generation
-- ARGV  1 generation, '' = any  2 epoch  3 log  4 most bytes kept  5 data  6 mark: 1 shadow, 2 backfill  7.. head
-- Gives 1 appended | -1 generation | -2 the log is lost | -3 epoch | -4 too much is kept
local log, data = ARGV[3], ARGV[5]
if ARGV[1] ~= '' and redis.call('GET', KEYS[3]) ~= ARGV[1] then return -1 end
if redis.call('EXISTS', KEYS[1]) == 0 then return -2 end
local c = redis.call('HMGET', KEYS[2], 'epoch', log .. '/rows', log .. '/bytes', log .. '/first_bytes')
if c[1] ~= ARGV[2] then return -3 end
if not c[2] then return -2 end
local bytes = string.format('%.0f', tonumber(c[3]) + #data)
if tonumber(bytes) - tonumber(c[4]) > tonumber(ARGV[4]) then return -4 end
local now = redis.call('TIME')
local fields = {'t', now[1] .. string.format('%06d', now[2]), 'r', c[2], 'b', bytes, 'd', data, 'x', ARGV[6]}
for i = 7, #ARGV do fields[#fields + 1] = ARGV[i] end
local id = redis.call('XADD', KEYS[1], 'NOMKSTREAM', ARGV[2] .. '-*', unpack(fields))
redis.call('HSET', KEYS[2], log .. '/last', string.match(id, '-(%d+)$'), log .. '/bytes', bytes)
return 1
