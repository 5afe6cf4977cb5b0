"""``murf-fast ablations``: the papers' ablations as far as they are computations on features, on the bundled photos."""
