"""``impl="torch"``: the algebra of the operations in plain PyTorch, on any device.

The fallback where no compiled kernel can run, and the honest baseline a kernel has to
beat. ``pairwise.forward``, ``pairwise.backward``, ``consistency.forward`` and dependence's
``gram_forward`` and ``gram_backward`` have the signatures of the registered operators.
"""
