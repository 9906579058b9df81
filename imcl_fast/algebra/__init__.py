"""``impl="torch"``: the algebra of both operations in plain PyTorch, on any device.

The fallback where no compiled kernel can run, and the honest baseline a kernel has to
beat. ``pairwise.forward``, ``pairwise.backward`` and ``consistency.forward`` have the
signatures of the registered operators.
"""
