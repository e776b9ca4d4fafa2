#!lua flags=allow-oom
-- Takes a group past entries of a log that it will get by another way: finishes what it holds of them, skips the rest.
-- KEYS  1 stream   ARGV  1 group  2 epoch and 3 seq of the last entry to pass
-- Gives how many entries it held
local function parse(id)
  local epoch, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(epoch), tonumber(seq)
end
local to = ARGV[2] .. '-' .. ARGV[3]
local held = 0
while true do
  local p = redis.call('XPENDING', KEYS[1], ARGV[1], '-', to, 1000)
  if #p == 0 then break end
  local ids = {}
  for _, entry in ipairs(p) do ids[#ids + 1] = entry[1] end
  held = held + redis.call('XACK', KEYS[1], ARGV[1], unpack(ids))
end
for _, g in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local info = {}
  for i = 1, #g, 2 do info[g[i]] = g[i + 1] end
  if info['name'] == ARGV[1] then
    local epoch, seq = parse(info['last-delivered-id'])
    if epoch < tonumber(ARGV[2]) or (epoch == tonumber(ARGV[2]) and seq < tonumber(ARGV[3])) then
      redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], to)
    end
  end
end
return held
