"""What a network costs and what it is made of."""

import numpy as np
from torch import Tensor, nn


def parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def nonzero_parameters(model: nn.Module) -> int:
    """Trainable parameters that are not exactly 0."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters() if parameter.requires_grad)


def magnitude_histogram(weights: Tensor) -> dict[str, list]:
    """Nonzero weights by |w|, ten bins a decade: {"edges": 61 numbers from 1e-5 to 10, "counts": 60 integers}.

    The few weights beyond either end count in the bin there.
    """
    magnitudes = weights[weights != 0].abs().double().clamp(1e-5, 10).cpu().numpy()
    counts, edges = np.histogram(magnitudes, bins=np.logspace(-5, 1, 61))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
