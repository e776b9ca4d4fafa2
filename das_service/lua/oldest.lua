#!lua flags=no-writes,allow-oom
-- When the oldest entry that a stream keeps was taken. KEYS 1 stream   Gives microseconds, or '' if there is no entry
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)
if not first[1] then return '' end
for i = 1, #first[1][2], 2 do
  if first[1][2][i] == 't' then return first[1][2][i + 1] end
end
return ''
