"""One random network, pruned at random and compared with the oracle."""

from dataclasses import dataclass
from random import Random

import torch
from torch import nn

from pruning.compaction import compact
from pruning.filters import filter_scores, filters_to_keep, mark_weakest
from pruning.surgery import find_channels, remove_filters
from tests.pruning.oracle import CONVOLUTION, check_removal, largest_difference, randomize
from tests.pruning.random_networks import random_network


@dataclass(frozen=True)
class Case:
    """What became of one network: the numbers of its filters, and the largest difference from the oracle."""

    filters: int
    fixed: int
    marked: int
    removed: int
    difference: float


def removal(random: Random, steps: int = 12) -> Case:
    """Removes whole groups at random, now and then single filters too. Raises AssertionError with the source."""
    net = random_network(random, steps)
    generator = torch.Generator().manual_seed(random.randrange(2**30))
    fraction, scattered = random.choice([0.2, 0.5, 0.9]), random.random() < 0.2
    try:
        model, example = randomize(net.module(), net.example()), net.example()
        channels = find_channels(model, example)
        reasons = [reason for trace in channels.traces for _, reason in trace.fixed]
        assert not any("cannot be followed" in reason for reason in reasons), "the rule of an operation failed"
        highest = max((int(ids.max()) for ids in channels.filters.values()), default=0)
        chosen = torch.rand(highest + 1, generator=generator) < fraction
        chosen[0] = False  # the fixed
        marked = {path: chosen[ids] for path, ids in channels.filters.items()}
        if random.random() < 0.3:  # as a user would mark them
            scores = filter_scores(model, "random", generator, example)
            marked |= mark_weakest(scores, filters_to_keep(scores, fraction, "quantile"))
        if scattered:
            marked = {path: mark | (torch.rand(len(mark), generator=generator) < 0.2) for path, mark in marked.items()}
        narrow, removed = remove_filters(model, example, marked)
        assert all(not (removed[path] & ~mark).any() for path, mark in marked.items()), "removed what was not marked"
        difference = check_removal(model, example, narrow, removed)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{net.text()}") from error
    return Case(
        filters=sum(len(ids) for ids in channels.filters.values()),
        fixed=sum(int((ids == 0).sum()) for ids in channels.filters.values()),
        marked=sum(int(mark.sum()) for mark in marked.values()),
        removed=sum(int(filters.sum()) for filters in removed.values()),
        difference=difference,
    )


def compaction(random: Random, steps: int = 12) -> Case:
    """Zeroes weights at random, compacts, and compares at two image sizes. Raises AssertionError with the source."""
    net = random_network(random, steps, any_size=True)
    generator = torch.Generator().manual_seed(random.randrange(2**30))
    try:
        model, example = randomize(net.module(), net.example()), net.example()
        zero_at_random(model, generator)
        small = compact(model, example)
        model.eval()
        difference = max(largest_difference(model, small, net.example(size)) for size in (0, 1))
        assert difference <= 1e-9, f"off by {difference:.1e}"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{net.text()}") from error
    before, after = ([m.weight.shape[0] for m in net.modules() if is_layer(m)] for net in (model, small))
    return Case(sum(before), 0, 0, sum(before) - sum(after), difference)


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTION | nn.Linear)


@torch.no_grad()
def zero_at_random(model: nn.Module, generator: torch.Generator) -> None:
    """Zeros in whole filters, in whole inputs and scattered, and in some biases."""
    for module in filter(is_layer, model.modules()):
        weight = module.weight
        for axis in (0, 1):
            weight.index_fill_(axis, (torch.rand(weight.shape[axis], generator=generator) < 0.3).nonzero()[:, 0], 0)
        weight[torch.rand(weight.shape, generator=generator) < 0.3] = 0
        if module.bias is not None:
            module.bias[torch.rand(len(module.bias), generator=generator) < 0.4] = 0
