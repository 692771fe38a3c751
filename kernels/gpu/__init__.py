"""The Triton kernels, one file per op; a file is imported when its kernel first runs."""
