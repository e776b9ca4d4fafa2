#!lua flags=no-writes,allow-oom
-- What a group has yet to finish in a log: entries that it holds (the first 100 are looked at) and those not delivered.
-- KEYS  1 counters  2 stream   ARGV  1 log  2 group
-- Gives {entries, rows, bytes, when the oldest was taken in us or ''}; all 0 where there is no such group
local function field(entry, name)
  for i = 1, #entry[2], 2 do
    if entry[2][i] == name then return entry[2][i + 1] end
  end
end
local function number(text) return string.format('%.0f', text) end
local info
for _, g in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
  local found = {}
  for i = 1, #g, 2 do found[g[i]] = g[i + 1] end
  if found['name'] == ARGV[2] then info = found end
end
local c = redis.call('HMGET', KEYS[1], ARGV[1] .. '/rows', ARGV[1] .. '/bytes', ARGV[1] .. '/last', 'epoch')
if not info or not c[1] then return {'0', '0', '0', ''} end
local entries, rows, bytes, oldest = 0, 0, 0, ''
for _, pending in ipairs(redis.call('XPENDING', KEYS[2], ARGV[2], '-', '+', 100)) do
  local entry = redis.call('XRANGE', KEYS[2], pending[1], pending[1])[1]
  if entry then
    entries, rows, bytes = entries + 1, rows + tonumber(field(entry, 'n')), bytes + #field(entry, 'd')
    if oldest == '' then oldest = field(entry, 't') end
  end
end
local next = redis.call('XRANGE', KEYS[2], '(' .. info['last-delivered-id'], '+', 'COUNT', 1)[1]
if next then
  local seq = tonumber(string.match(next[1], '-(%d+)$'))
  entries = entries + tonumber(c[3]) - seq + 1
  rows = rows + tonumber(c[1]) - tonumber(field(next, 'r')) + tonumber(field(next, 'n'))
  bytes = bytes + tonumber(c[2]) - tonumber(field(next, 'b')) + #field(next, 'd')
  if oldest == '' then oldest = field(next, 't') end
end
return {number(entries), number(rows), number(bytes), oldest}
