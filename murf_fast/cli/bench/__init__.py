"""``murf-fast bench``: the suites of a checkout, and latency and memory of two upsamplers by output size."""
