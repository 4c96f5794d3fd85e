"""N:M sparsity: of every M neighbouring inputs of a filter at most N weights stay.

Hardware can skip the zeros of such a pattern, as NVIDIA's sparse tensor cores do those of 2:4. Mishra et al. 2021,
"Accelerating sparse deep neural networks", arXiv:2104.08378, section 3.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that a wrong pattern is refused without torch
    from torch import Tensor


def parse(scope: str) -> tuple[int, int] | None:
    """(N, M) of "N:M"; None for what is no such pattern, as where N is not below M.

    >>> parse("2:4"), parse("4:2"), parse("layer")
    ((2, 4), None, None)
    """
    found = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", scope)
    kept, size = map(int, found.groups()) if found else (0, 0)
    return (kept, size) if kept < size else None


def top_n_of_m(scores: Tensor, mask: Tensor, axis: int, pattern: tuple[int, int]) -> Tensor:
    """True for the N highest of every M neighbours along `axis`, whose length is a multiple of M; boolean, as `mask`.

    Where `mask` is False a score counts as the lowest. Of equals the later ones are the highest, as everywhere here.

    >>> import torch
    >>> top_n_of_m(torch.tensor([[1., 4., 3., 2., 0., 0., 0., 5.]]), torch.ones(1, 8, dtype=torch.bool), 1, (2, 4))
    tensor([[False,  True,  True, False, False, False,  True,  True]])
    """
    kept, size = pattern
    groups = scores.masked_fill(~mask, -1).movedim(axis, -1).unflatten(-1, (-1, size))  # (..., inputs / M, M)
    order = groups.argsort(dim=-1, stable=True)
    highest = groups.new_zeros(groups.shape, dtype=mask.dtype).scatter_(-1, order[..., -kept:], True)
    return highest.flatten(-2).movedim(-1, axis)


def within(scores: Tensor, mask: Tensor, axis: int, pattern: tuple[int, int], sparsity: float) -> tuple[Tensor, Tensor]:
    """Scores by which the top N of every M weights are pruned last, and the mask of those weights that may be kept.

    Below sparsity 1 - N/M none of the top N is pruned and every weight may be kept, from there on these alone.

    >>> import torch
    >>> within(torch.tensor([[3., 1., 2., 4.]]), torch.ones(1, 4, dtype=torch.bool), 1, (1, 2), 0.25)
    (tensor([[inf, 1., 2., inf]]), tensor([[True, True, True, True]]))
    """
    kept, size = pattern
    top = top_n_of_m(scores, mask, axis, pattern)
    if round(sparsity * mask.numel()) < mask.numel() // size * (size - kept):
        return scores.masked_fill(top, math.inf), mask.clone()
    return scores, mask & top
