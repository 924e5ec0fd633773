-- For wrk: requests that differ in their keys, which are read from files of keys (see data.py).
-- Arguments after `--`: seed, prefix and suffix of the target, and for each source of keys: its file, the length of a
-- key, the step from one key to the next, and its share of the requests.

local ffi = require("ffi")
ffi.cdef [[
    int open(const char *path, int flags, ...);
    long lseek(int fd, long offset, int whence);
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset);
]]
local O_RDONLY, SEEK_END, PROT_READ, MAP_SHARED = 0, 2, 1, 1

local sources, before, after = {}, nil, nil

local function source(path, length, step, share)
    local descriptor = ffi.C.open(path, O_RDONLY)
    assert(descriptor >= 0, path)
    local size = tonumber(ffi.C.lseek(descriptor, 0, SEEK_END))
    local bytes = ffi.cast("const char *", ffi.C.mmap(nil, size, PROT_READ, MAP_SHARED, descriptor, 0))
    return { bytes = bytes, length = length, step = step, number = math.floor((size - length) / step) + 1, share = share }
end

function init(args)
    math.randomseed(tonumber(args[1]))
    before = "GET " .. args[2]
    -- The header fields that Nix sends.
    after = args[3] .. " HTTP/1.1\r\nHost: " .. wrk.host .. ":" .. wrk.port
        .. "\r\nAccept: */*\r\nAccept-Encoding: deflate, gzip, br, zstd\r\nUser-Agent: curl/8.5.0 Nix/2.26.3\r\n\r\n"
    for place = 4, #args, 4 do
        sources[#sources + 1] =
            source(args[place], tonumber(args[place + 1]), tonumber(args[place + 2]), tonumber(args[place + 3]))
    end
end

local random = math.random

function request()
    local from = sources[1]
    if sources[2] and random() >= from.share then
        from = sources[2]
    end
    return before .. ffi.string(from.bytes + random(0, from.number - 1) * from.step, from.length) .. after
end

function done(summary, latency)
    io.write(string.format(
        '\nRESULT {"requests": %d, "seconds": %f, "bytes": %d, "refused": %d, "failed": %d, "p50": %f, "p99": %f}\n',
        summary.requests, summary.duration / 1e6, summary.bytes, summary.errors.status,
        summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout,
        latency:percentile(50) / 1e3, latency:percentile(99) / 1e3
    ))
end
