-- wrk: chat requests whose first half is shared within a group of prompts and whose second half is new each
-- time. Arguments behind `--`: prompt bytes, 1 for streaming, a number that no other run has.
local groups, heads, count = 32, {}, 0
local template = 'POST %s HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n' ..
  'content-length: %d\r\n\r\n%s'

local function letters(seed, n)
  math.randomseed(seed)
  local out = {}
  for i = 1, n do out[i] = string.char(97 + math.random(0, 25)) end
  return table.concat(out)
end

function init(args)
  local size, stream = tonumber(args[1]), args[2] == '1'
  run = tonumber(args[3])
  local own = letters(99, size / 2 - 20)
  tail = own .. '"}]}'
  for group = 1, groups do
    local head = '{"model":"fake","stream":' .. tostring(stream) .. ',"max_tokens":8,"messages":[' ..
      '{"role":"system","content":"' .. letters(group, size / 2) .. '"},{"role":"user","content":"'
    local length = #head + 20 + #tail
    heads[group] = string.format(template, wrk.path, length, head)
  end
end

function request()
  count = count + 1
  return heads[count % groups + 1] .. string.format('%08d%012d', run, count) .. tail
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"requests":%d,"seconds":%.6f,"p50":%.7f,"p90":%.7f,"p99":%.7f,"errors":%d}\n', summary.requests,
    summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(90) / 1e6,
    latency:percentile(99) / 1e6,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
