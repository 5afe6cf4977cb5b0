"""``murf-fast tables``: latency and memory tables of papers, measured here, with their figures.

A table is a file in ``kinds``: the columns, and cases that say what is run. One runner measures them and writes a file
of results as it goes, from which every format and the figure are made.
"""
