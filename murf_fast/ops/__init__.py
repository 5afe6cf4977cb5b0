"""The operations: thin functions over kernels, registered with torch.library."""

from murf_fast.ops.resize import resize
from murf_fast.ops.upsample_concat import upsample_concat
from murf_fast.ops.upsample_sum import upsample_sum

__all__ = ["resize", "upsample_concat", "upsample_sum"]
