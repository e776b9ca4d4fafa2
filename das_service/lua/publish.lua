#!lua flags=allow-oom
-- A worker's atomic step for one entry: online values, scored rows, dead letters, and last the acknowledgement.
-- KEYS  1 source stream  2 scored stream  3 dead-letter stream  4 counters  5 generation  6 attempts
-- ARGV  1 group  2 entry  3 consumer  4 generation  5 epoch  6 fm  7 seconds to live  8 key prefix  9 digests
--       10 values  11 width of a value  12 1 where MSETEX exists  13 scored rows  14 scored data  15 dead rows
--       16 dead data  17 number of head arguments of the scored chunk  18.. its head, then the dead chunk's
-- Gives {code, available_at in us}: 1 published | 0 the entry is not ours | -1 generation | -2 a log is lost | -3 epoch
local fm, epoch, ttl, prefix, digests, values = ARGV[6], ARGV[5], ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local width = tonumber(ARGV[11])
if redis.call('GET', KEYS[5]) ~= ARGV[4] then return {-1, 0} end
if redis.call('EXISTS', KEYS[2], KEYS[3], KEYS[1]) < 3 then return {-2, 0} end
if redis.call('HGET', KEYS[4], 'epoch') ~= epoch then return {-3, 0} end
local p = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if #p == 0 or p[1][2] ~= ARGV[3] then return {0, 0} end

local sub = string.sub
local function put_absent(i)  -- first write wins; only a failure gives way
  local key = prefix .. sub(digests, i * 16 - 15, i * 16)
  local value = sub(values, (i - 1) * width + 1, i * width)
  if not redis.call('SET', key, value, 'EX', ttl, 'NX') and redis.call('GETRANGE', key, 1, 1) == '\1' then
    redis.call('SET', key, value, 'EX', ttl)
  end
end
local n = #digests / 16
for first = 1, n, 1000 do
  local last = math.min(first + 999, n)
  local done = 0
  if ARGV[12] == '1' then
    local args = {last - first + 1}
    local at = 1  -- counted here: # searches the table each time
    for i = first, last do
      args[at + 1] = prefix .. sub(digests, i * 16 - 15, i * 16)
      args[at + 2] = sub(values, (i - 1) * width + 1, i * width)
      at = at + 2
    end
    args[at + 1] = 'NX'
    args[at + 2] = 'EX'
    args[at + 3] = ttl
    done = redis.call('MSETEX', unpack(args))
  end
  if done == 0 then
    for i = first, last do put_absent(i) end
  end
end

local now = redis.call('TIME')
local taken = now[1] .. string.format('%06d', now[2])
local function append(stream, log, num_rows, data, from, to)
  local c = redis.call('HMGET', KEYS[4], log .. '/rows', log .. '/bytes')
  local rows = string.format('%.0f', tonumber(c[1]) + num_rows)
  local bytes = string.format('%.0f', tonumber(c[2]) + #data)
  local fields = {'t', taken, 'r', rows, 'b', bytes, 'd', data}
  for i = from, to do fields[#fields + 1] = ARGV[i] end
  local id = redis.call('XADD', stream, 'NOMKSTREAM', epoch .. '-*', unpack(fields))
  redis.call('HSET', KEYS[4], log .. '/last', string.match(id, '-(%d+)$'), log .. '/rows', rows, log .. '/bytes', bytes)
end
local head = tonumber(ARGV[17])
if tonumber(ARGV[13]) > 0 then append(KEYS[2], 'scored:' .. fm, tonumber(ARGV[13]), ARGV[14], 18, 17 + head) end
if tonumber(ARGV[15]) > 0 then append(KEYS[3], 'dead:' .. fm, tonumber(ARGV[15]), ARGV[16], 18 + head, #ARGV) end
redis.call('HDEL', KEYS[6], ARGV[2])
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
return {1, tonumber(taken)}
