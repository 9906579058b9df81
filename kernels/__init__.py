"""Triton kernels: of each operation a launcher in a file of its name, and the kernels that it
launches in files that begin with it."""
