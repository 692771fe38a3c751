"""The ops of nudging, one per file.  Import-free: other packages probe for a module called `kernels`."""
