"""Tables that kernels walk, computed on the host and kept: banded matrices of resizes and filters, composed windows,
blocks of queries; and the moments of many pixels."""
