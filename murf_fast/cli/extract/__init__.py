"""``murf-fast extract``."""
