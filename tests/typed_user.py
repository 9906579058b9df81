"""What mypy must make of a user's calls: `make lint` checks it, and nothing runs it."""

import torch

from imcl_fast import functional as F

z, y = torch.randn(3, 4, 5, requires_grad=True), torch.zeros(4, dtype=torch.int64)
F.collaborative_consistency(z, y).backward()
F.collaborative_consistency(z, y, return_terms=False).backward()
loss, terms = F.collaborative_consistency(z, y, return_terms=True)
terms["kl"].sum()
loss.backward()
