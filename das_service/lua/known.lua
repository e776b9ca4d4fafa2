#!lua flags=no-writes,allow-oom
-- Which examples have an online value already.
-- KEYS  1 counters (the slot)   ARGV  1 key prefix  2 digests
-- Gives row number (from 0) and the value's first 16 bytes in turn; empty where none is known
local prefix, digests = ARGV[1], ARGV[2]
local found = {}
local n = #digests / 16
for first = 1, n, 1000 do
  local last = math.min(first + 999, n)
  local keys = {}
  for i = first, last do keys[#keys + 1] = prefix .. string.sub(digests, i * 16 - 15, i * 16) end
  if redis.call('EXISTS', unpack(keys)) > 0 then
    for i = first, last do
      local head = redis.call('GETRANGE', keys[i - first + 1], 0, 15)
      if #head > 0 then
        found[#found + 1] = i - 1
        found[#found + 1] = head
      end
    end
  end
end
return found
