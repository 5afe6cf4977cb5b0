"""The commands of ``murf-fast anomaly``."""
