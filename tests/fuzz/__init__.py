"""Random cases of every public operation, and right values found without the library's tables and definitions.

``draw`` makes a case from (operation, seed, index), ``cases_*`` call the operation and say what is right, ``compare``
holds the results against it. Right values come from NumPy, SciPy, loops or ``torch.nn.functional`` in float64; nothing
here imports ``murf_fast.reference`` or the resize tables.
"""
