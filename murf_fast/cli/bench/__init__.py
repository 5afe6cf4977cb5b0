"""``murf-fast bench``: the suites of a checkout."""
