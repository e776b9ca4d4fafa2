#!lua flags=no-writes,allow-oom
-- What a reader of a log has yet to finish: entries that it holds, and those after its place.
-- KEYS  1 counters  2 stream   ARGV  1 log  2 group, or '' for a reader without one  3 its place then: an entry id or ''
--       4 the last entry that is asked about, or '+'
-- Gives {entries, rows, bytes, when the oldest was taken in us or '', the first entry after its place, or else the one to
-- come}; all 0 where there is no such group. Held entries behind 10,000 others or 500 runs are taken to be like those.
local SLICE, MOST_HELD, MOST_RUNS, MOST_UNREADABLE = 1000, 10000, 500, 10
local entries, rows, bytes, oldest, next_id = 0, 0, 0, '', ''
local function number(n) return string.format('%.0f', n) end
local function parse(id)
  local epoch, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(epoch), tonumber(seq)
end
local function read(from, to, command)  -- the first of the next few entries that can be read
  for _ = 1, MOST_UNREADABLE do
    local found = redis.call(command or 'XRANGE', KEYS[2], from, to, 'COUNT', 1)[1]
    if not found then return nil end
    local f = {}
    for i = 1, #found[2], 2 do f[found[2][i]] = found[2][i + 1] end
    local r, n, b = tonumber(f['r']), f['x'] and 0 or tonumber(f['n']), tonumber(f['b'])
    if r and n and b and f['t'] then
      return {id = found[1], t = f['t'], r = r, n = n, b = b, d = #(f['d'] or '')}
    end
    from = '(' .. found[1]
  end
end

local function add_run(from, to)  -- entries side by side: what they count up to tells their sum
  local first = read(from, to)
  local last = from == to and first or read(to, to)
  if not first or not last then return end
  rows, bytes = rows + last.r - first.r + first.n, bytes + last.b - first.b + first.d
  if oldest == '' then oldest = first.t end
end
local function add_held(group, up_to)
  local looked_at, runs, start = 0, 0, '-'
  local from, to, next_epoch, next_seq
  while looked_at < MOST_HELD and runs < MOST_RUNS do
    local held = redis.call('XPENDING', KEYS[2], group, start, up_to, SLICE)
    for _, pending in ipairs(held) do
      local epoch, seq = parse(pending[1])
      if from and (epoch ~= next_epoch or seq ~= next_seq) then
        add_run(from, to)
        from, runs = nil, runs + 1
        if runs == MOST_RUNS then return looked_at end
      end
      from, to, next_epoch, next_seq = from or pending[1], pending[1], epoch, seq + 1
      looked_at, start = looked_at + 1, '(' .. pending[1]
    end
    if #held < SLICE then break end
  end
  if from then add_run(from, to) end
  return looked_at
end
local function add_after(place, up_to, final)  -- final: the last entry up to there, whether it is still kept or not
  local from = place == '' and '-' or '(' .. place
  local first = redis.call('XRANGE', KEYS[2], from, up_to, 'COUNT', 1)[1]
  if not first then
    next_id = number(final.epoch) .. '-' .. number(final.seq + 1)
    return
  end
  next_id = first[1]
  local after = read(from, up_to)
  if after then
    rows, bytes = rows + final.r - after.r + after.n, bytes + final.b - after.b + after.d
    if oldest == '' then oldest = after.t end
  end
  local epoch, seq = parse(next_id)
  while epoch < final.epoch do  -- sequence numbers start again in each epoch
    local last = redis.call('XREVRANGE', KEYS[2], number(epoch), number(epoch) .. '-0', 'COUNT', 1)[1][1]
    local _, last_seq = parse(last)
    entries = entries + last_seq - seq + 1
    local following = redis.call('XRANGE', KEYS[2], '(' .. last, up_to, 'COUNT', 1)[1]
    if not following then return end
    epoch, seq = parse(following[1])
  end
  entries = entries + final.seq - seq + 1
end

local c = redis.call('HMGET', KEYS[1], ARGV[1] .. '/rows', ARGV[1] .. '/bytes', ARGV[1] .. '/last', 'epoch')
local place, up_to = ARGV[3], ARGV[4]
if ARGV[2] ~= '' then
  place = nil
  for _, g in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
    local info = {}
    for i = 1, #g, 2 do info[g[i]] = g[i + 1] end
    if info['name'] == ARGV[2] then
      place, entries = info['last-delivered-id'], info['pending']
    end
  end
  if place and entries > 0 then
    local looked_at = add_held(ARGV[2], up_to)
    if up_to ~= '+' then entries = looked_at end
    local share = looked_at > 0 and entries / looked_at or 0
    rows, bytes = rows * share, bytes * share
  end
end
if place and c[1] and c[4] then
  local final = {epoch = tonumber(c[4]), seq = tonumber(c[3]), r = tonumber(c[1]), b = tonumber(c[2])}
  if up_to ~= '+' then
    final = read(up_to, '-', 'XREVRANGE')
    if final then final.epoch, final.seq = parse(final.id) end
  end
  if final then add_after(place, up_to, final) end
end
return {number(entries), number(rows), number(bytes), oldest, next_id}
