"""How often every instruction of a compiled kernel runs, without a GPU.

``code`` reads what cuobjdump prints, ``flow`` finds the instructions that decide where branches go, and ``run`` runs
those, and no others, for a program of a launch: unrolled loops, their remainders and early exits are counted as such.
"""
