"""Programmatic dependent launch: a kernel may be launched while the one before it on the stream ends.

That hides the start of its programs.  What makes it safe is that each waits, before anything else, until
the one before is complete: it reads nothing that is not written, overwrites nothing that is still read, and
as the one before has waited likewise, nothing older runs either.  A kernel that does not wait must be
launched as usual (`Config.options` is for those that do).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(PDL: tl.constexpr):
    """The first statement of a kernel that is launched by `Config.options`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
