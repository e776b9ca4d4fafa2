#!lua flags=allow-oom
-- Frees what is committed and that no group still needs.
-- KEYS  1 counters  2 stream   ARGV  1 log  2 epoch and 3 seq of the first entry to keep  4.. groups that must have read
-- Gives {entries freed, name of the group that holds things up or ''}
local function before(a, b) return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2]) end
local function parse(id)
  local epoch, seq = string.match(id, '^(%d+)-(%d+)$')
  return {tonumber(epoch), tonumber(seq)}
end
local keep, holder = {tonumber(ARGV[2]), tonumber(ARGV[3])}, ''
if #ARGV > 3 then
  local groups = {}
  for _, g in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
    local info = {}
    for i = 1, #g, 2 do info[g[i]] = g[i + 1] end
    groups[info['name']] = info
  end
  for i = 4, #ARGV do
    local info = groups[ARGV[i]]
    if not info then return {0, ARGV[i]} end
    local need
    if info['pending'] > 0 then
      need = parse(redis.call('XPENDING', KEYS[2], ARGV[i])[2])
    else
      need = parse(info['last-delivered-id'])
      need[2] = need[2] + 1
    end
    if before(need, keep) then keep, holder = need, ARGV[i] end
  end
end
local minid = string.format('%.0f-%.0f', keep[1], keep[2])
local freed = redis.call('XTRIM', KEYS[2], 'MINID', '=', minid)
local c = redis.call('HMGET', KEYS[1], ARGV[1] .. '/rows', ARGV[1] .. '/bytes')
local rows, bytes = c[1], c[2]
local first = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)
if first[1] then
  local f = {}
  for i = 1, #first[1][2], 2 do f[first[1][2][i]] = first[1][2][i + 1] end
  local r, b = tonumber(f['r']), tonumber(f['b'])  -- nil in an entry that nobody can read
  if r then rows = string.format('%.0f', r - (f['x'] and 0 or tonumber(f['n']) or 0)) end
  if b then bytes = string.format('%.0f', b - #(f['d'] or '')) end
end
if rows then redis.call('HSET', KEYS[1], ARGV[1] .. '/first_rows', rows, ARGV[1] .. '/first_bytes', bytes) end
return {freed, holder}
