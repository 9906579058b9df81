"""Triton kernels, one file per operation. None are written yet: CPU tensors need none,
and tensors on a GPU fall back to ``impl="torch"``."""
