"""The smallest call of one operation on a GPU, for compute-sanitizer.

python benchmarks/gpu_smallest.py --list
python benchmarks/gpu_smallest.py OP
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from registry import smallest_calls

if __name__ == "__main__":
    calls = smallest_calls()
    if sys.argv[1] == "--list":
        print(*calls)
    else:
        calls[sys.argv[1]]("cuda")
        torch.cuda.synchronize()
