#!lua flags=allow-oom
-- Begins a later epoch of a partition's logs: sequence numbers start again from 0, what the logs hold stays, and the
-- counters say what that is: what entries count up to goes on, whichever of entries and counters was lost.
-- KEYS  1 counters  2.. streams   ARGV  1 epoch  2 the epoch that the caller saw, or ''  3.. their logs
-- Gives 1, or 0 if the epoch is another one by now
local function fields(reply)
  if not reply[1] then return nil end
  local f = {id = reply[1][1]}
  for i = 1, #reply[1][2], 2 do f[reply[1][2][i]] = reply[1][2][i + 1] end
  return f
end
if (redis.call('HGET', KEYS[1], 'epoch') or '') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1])
for i = 3, #ARGV do
  local log, stream = ARGV[i], KEYS[i - 1]
  local first = fields(redis.call('XRANGE', stream, '-', '+', 'COUNT', 1))
  local last = fields(redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1))
  local rows = last and last['r'] or redis.call('HGET', KEYS[1], log .. '/rows') or '0'
  local bytes = last and last['b'] or redis.call('HGET', KEYS[1], log .. '/bytes') or '0'
  local first_rows, first_bytes = rows, bytes
  if first and first['r'] then first_rows = string.format('%.0f', first['r'] - (first['x'] and 0 or first['n'] or 0)) end
  if first and first['b'] then first_bytes = string.format('%.0f', first['b'] - #(first['d'] or '')) end
  redis.call('HSET', KEYS[1], log .. '/last', '-1', log .. '/older', last and last.id or '', log .. '/rows', rows,
    log .. '/bytes', bytes, log .. '/first_rows', first_rows, log .. '/first_bytes', first_bytes)
end
return 1
