"""One file per table, under the name it has on the command line; each holds a ``TABLE``."""
