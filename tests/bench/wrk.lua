-- What wrk has measured, for a program to read: requests, microseconds, the latency's 50th and 99th percentile, errors.
done = function(summary, latency)
    local e = summary.errors
    local errors = e.connect + e.read + e.write + e.status + e.timeout
    io.write(string.format("figures %d %d %d %d %d\n", summary.requests, summary.duration,
        latency:percentile(50), latency:percentile(99), errors))
end
