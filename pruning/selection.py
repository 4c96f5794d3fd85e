"""Finding the weakest weights of many layers exactly, with as few passes over memory as can be.

A sorted sample tells, for each layer, a bracket in which its cutoff must lie. One pass collects the few scores inside
the bracket and counts those above; among them the cutoff is found exactly. A second pass sets the masks. Where the
sample was misleading, which is noticed, everything is collected. On the CPU numpy does this in pieces that stay in the
cache, several times as fast as torch; elsewhere torch takes each layer in one piece.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 16  # numbers, so that a few arrays of them fit in the cache

Array = Any  # a numpy array on the CPU, a tensor elsewhere: used where both are spelled alike
EVERYTHING = (-math.inf, math.inf)


@dataclass(frozen=True)
class Layer:
    """Scores are |values|, times the root of `curvature` if there is one; all arrays have the weight's shape."""

    name: str
    values: Array
    mask: Array
    curvature: Array | None
    alive: int  # unmasked weights

    @classmethod
    def of(cls, name: str, values: Tensor, mask: Tensor, curvature: Tensor | None = None) -> "Layer":
        if values.element_size() < 4:
            values = values.float()  # numpy knows no bfloat16
        curvature = None if curvature is None else array(curvature)
        return cls(name, array(values), array(mask), curvature, count_true(array(mask)))

    def scores(self, index: Any) -> Array:  # noqa: ANN401
        """The scores of these weights."""
        scores = abs(self.values[index])
        if self.curvature is not None:
            scores *= self.curvature[index] ** 0.5
        return scores

    def pieces(self) -> Iterator[tuple[Array, Array]]:
        """Scores and a view of their mask, some rows at a time."""
        rows, size = len(self.mask), math.prod(self.mask.shape)
        step = max(1, PIECE * rows // max(1, size)) if isinstance(self.mask, np.ndarray) else rows
        for start in range(0, rows, step):
            piece = slice(start, start + step)
            yield self.scores(piece), self.mask[piece]


@dataclass(frozen=True)
class Cut:
    """The weights of a layer to mask: of the scores `inside` a bracket the `share` lowest, and all that are lower."""

    layer: Layer
    inside: Array
    share: int

    def apply(self) -> None:
        """Set their masks to False."""
        cutoff = kth_lowest(self.inside, self.share)
        falling = self.share - count_true(self.inside < cutoff)  # of those that equal the cutoff
        some_stay = falling < count_true(self.inside == cutoff)
        for scores, mask in self.layer.pieces():
            stays = scores > cutoff
            if some_stay:
                equal = (mask & (scores == cutoff)).reshape(-1)
                stays |= (equal & (equal.cumsum(0) > falling)).reshape(stays.shape)
                falling -= count_true(equal)
            mask &= stays


@dataclass(frozen=True)
class Scan:
    """One layer's unmasked scores: how many are `below` a bracket, those `inside`, how many are `above` and the sum
    of their squares, `energy`."""

    below: int
    inside: Array
    above: int
    energy: float


def find_weakest(layers: list[Layer], sparsity: float, lamp: bool = False) -> list[Cut]:
    """The weights to mask, those of the lowest scores, so that round(sparsity * n) of all layers' n weights are masked.

    Ties are broken by position: earlier layers, then earlier elements, first. The strongest of each layer, of equals
    the last, stays. With `lamp`, layers are compared by `lamp_scores`. Raises ValueError where a score is NaN.
    """
    size, alive = sum(math.prod(layer.mask.shape) for layer in layers), sum(layer.alive for layer in layers)
    count = round(sparsity * size) - (size - alive)
    if count <= 0:
        return []
    for brackets in (guess_brackets(layers, count / alive, lamp), [EVERYTHING] * len(layers)):
        scans = [scan(layer, *bracket, lamp) for layer, bracket in zip(layers, brackets, strict=True)]
        ranked = [rankable(layer, each, lamp) for layer, each in zip(layers, scans, strict=True)]
        shares = shares_of_lowest(ranked, count - sum(each.below for each in scans))
        if all(
            (each.below == 0 or share > 0) and (each.above == 0 or share < len(each.inside))
            for each, share in zip(scans, shares, strict=True)
        ):  # in each layer all below have fallen and all above have stayed
            break
    return [
        Cut(layer, each.inside, share) for layer, each, share in zip(layers, scans, shares, strict=True) if share > 0
    ]


def guess_brackets(layers: list[Layer], fraction: float, lamp: bool) -> list[tuple[float, float]]:
    """For each layer two scores between which its cutoff very likely lies when this fraction of all is masked."""
    step = math.isqrt(sum(math.prod(layer.mask.shape) for layer in layers)) // 10
    if step < 2:
        return [EVERYTHING] * len(layers)
    generator = torch.Generator().manual_seed(0)
    samples = [ascending(sample(layer, step, generator)) for layer in layers]
    scores = [lamp_scores(each) for each in samples] if lamp else samples
    total = sum(map(len, samples))
    wanted = round(fraction * total)
    if lamp:  # the sums of squares, which scores are relative to, are guesses of each layer's own sample
        shares = shares_of_lowest(scores, wanted)
        spreads = [spread(share, len(each)) for share, each in zip(shares, samples, strict=True)]
        fewest = [share - more for share, more in zip(shares, spreads, strict=True)]
        most = [share + more for share, more in zip(shares, spreads, strict=True)]
    else:
        fewest = shares_of_lowest(scores, wanted - spread(wanted, total))
        most = shares_of_lowest(scores, wanted + spread(wanted, total))
    return [  # of what is sure to fall, two at least are inside: of these, the strongest of the layer may be one
        (float(each[low - 2]) if low > 1 else -math.inf, float(each[high]) if high < len(each) else math.inf)
        for each, low, high in zip(samples, fewest, most, strict=True)
    ]


def spread(count: int, total: int) -> int:
    """Six standard deviations of how many of a sample of `total` are below a score, if `count` are, and ten more."""
    return 10 + math.ceil(6 * math.sqrt(count * (1 - count / max(1, total))))


def sample(layer: Layer, step: int, generator: torch.Generator) -> Array:
    """The scores of one weight of each `step` at random, without the masked ones."""
    shape = tuple(layer.mask.shape)
    places = torch.arange(0, math.prod(shape), step)
    places = (places + torch.randint(step, places.shape, generator=generator)).clamp_(max=math.prod(shape) - 1)
    if isinstance(layer.mask, Tensor):
        index = torch.unravel_index(places.to(layer.mask.device), shape)
    else:
        index = np.unravel_index(places.numpy(), shape)
    return layer.scores(index)[layer.mask[index]]


def scan(layer: Layer, low: float, high: float, lamp: bool) -> Scan:
    """One pass over a layer; NaN counts as inside. The energy is for `lamp` alone."""
    inside, above, energy = [], 0, 0.0
    for scores, mask in layer.pieces():
        candidates = mask > (scores < low)  # in the mask, and not below
        strong = candidates & (scores > high)
        inside.append(scores[candidates > strong])
        above += count_true(strong)
        if lamp:
            energy += float((double(scores[strong]) ** 2).sum())
    inside = joined(inside)
    return Scan(layer.alive - len(inside) - above, inside, above, energy)


def rankable(layer: Layer, scanned: Scan, lamp: bool) -> Array:
    """What is compared with other layers: the scores inside the bracket, without the one that stays in any case."""
    scores = lamp_scores(ascending(scanned.inside), scanned.energy) if lamp else scanned.inside
    refuse_nan(layer.name, scores)
    if scanned.above or not len(scores):
        return scores
    strongest = int(scores.argmax())
    return joined([scores[:strongest], scores[strongest + 1 :]])


def refuse_nan(name: str, scores: Array) -> None:
    """Raise ValueError if any of a layer's scores is NaN."""
    if (scores != scores).any():
        raise ValueError(f"{name}: a weight or its squared gradient is NaN, which cannot be ranked")


def lamp_scores(magnitudes: Array, energy: float = 0.0) -> Array:
    """Layer-adaptive magnitude: w_u^2 over the sum of w_v^2 of all v in the layer that come no earlier; float64.

    The magnitudes are in ascending order; `energy` is the sum of squares of those of the layer that come after them.
    Lee et al. 2021, "Layer-adaptive sparsity for the magnitude-based pruning", arXiv:2010.07611, eq. 1. The largest
    weight of every layer scores 1; among equals the earlier one scores lower.

    lamp_scores(array([1., 2., 2.])) = [1/9, 4/8, 4/4]
    """
    squares = double(magnitudes) ** 2
    not_smaller = energy + flipped(flipped(squares).cumsum(0))
    return squares / not_smaller.clip(min=np.finfo(np.float64).tiny)  # layers of zeros score 0, not NaN


def shares_of_lowest(scores: list[Array], count: int) -> list[int]:
    """How many of each array are among the `count` lowest of all arrays; ties fall in earlier arrays first."""
    together = joined(scores)
    count = min(count, len(together))
    if count <= 0:
        return [0] * len(scores)
    cutoff = kth_lowest(together, count)
    shares = [count_true(each < cutoff) for each in scores]
    left = count - sum(shares)
    for index, each in enumerate(scores):
        ties = min(left, count_true(each == cutoff))
        shares[index] += ties
        left -= ties
    return shares


def kth_lowest(values: Array, k: int) -> float:
    """The k-th lowest of the values, counted from 1. NaN is the highest."""
    if isinstance(values, Tensor):
        return float(values.sort().values[k - 1])  # on CUDA faster than kthvalue, which keeps to one block
    return float(np.partition(values, k - 1)[k - 1])


def array(tensor: Tensor) -> Array:
    """The same memory as numpy sees it, on the CPU."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def ascending(values: Array) -> Array:
    return values.sort().values if isinstance(values, Tensor) else np.sort(values)


def flipped(values: Array) -> Array:
    return values.flip(0) if isinstance(values, Tensor) else values[::-1]


def joined(arrays: list[Array]) -> Array:
    return torch.cat(arrays) if isinstance(arrays[0], Tensor) else np.concatenate(arrays)


def count_true(mask: Array) -> int:
    return int(mask.count_nonzero() if isinstance(mask, Tensor) else np.count_nonzero(mask))


def double(values: Array) -> Array:
    return values.double() if isinstance(values, Tensor) else values.astype(np.float64)
