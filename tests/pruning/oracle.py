"""The oracle: a network without its filters computes what it computes with them zeroed: weight, bias, gamma and beta.

What was removed is read off the values: after `randomize` no two numbers of a network are equal, and what is kept is
kept bit by bit, but for what makes up for narrower heads of attention. So the oracle knows nothing of how the surgery
follows channels, and judges other packages' too.
"""

import copy
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CONVOLUTION, BATCH_NORM = nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def randomize(model: nn.Module, example: Any = None, seed: int = 0) -> nn.Module:
    """The model in float64, every number in it another and none at its initial value, as after training.

    With an example the statistics of BatchNorm are near the true ones, so that no signal fades in a deep network.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.double().parameters():
        spread = parameter.flatten()[:999].std() if parameter.numel() > 1 else 0
        if spread > 0:
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator, dtype=torch.double))
        else:  # initialised to a constant
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORM) and module.track_running_stats]
    if example is not None and norms:
        momenta = [module.momentum for module in norms]
        for module in norms:
            module.momentum = 1.0
        call(model.train(), example)
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
    for module in norms:
        module.running_mean += 0.1 * torch.randn(module.num_features, generator=generator, dtype=torch.double)
        module.running_var *= 0.5 + torch.rand(module.num_features, generator=generator, dtype=torch.double)
    return model


def call(model: nn.Module, example: Any) -> Any:
    """The model's outputs for one input, a tuple or list of them, or a dict of keywords."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


def filters_of(weight: Tensor, module: nn.Module) -> Tensor:
    """The weight of a layer as one row for each of its outputs, a view `(C_out, everything else)` where it can be."""
    if getattr(module, "transposed", False):  # (C_in, C_out / groups, ...)
        weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def removed_filters(weight: Tensor, module: nn.Module, narrow: nn.Module, name: str) -> Tensor:
    """Which outputs of a layer the narrow one lacks, boolean `(C_out,)`."""
    kept = before_factors(weight, getattr(narrow, name))
    filters, kept = filters_of(weight, module), filters_of(kept, narrow)[:, 0]
    if getattr(module, "groups", 1) == 1:  # all filters are read at the same input: large layers are done in no time
        places = (filters == kept[0]).nonzero()
        assert len(places), f"{name} holds a number that was not there before"
        filters = filters[:, places[0, 1:]]
    return ~torch.isin(filters, kept).any(1)


def before_factors(dense: Tensor, narrow: Tensor) -> Tensor:
    """The narrow tensor with the dense one's numbers where it has multiples of them.

    The queries of attention are divided by the root of the width of a head, by those of torch.nn.functional and the
    keys by its fourth root each. Of narrower heads they are multiplied by the root of what is left of that width.
    """
    rows, numbers = narrow.flatten(min(1, narrow.dim() - 1)), dense.flatten().sort().values
    edges = torch.cat([rows[:, 0], rows[0]]) if rows.dim() == 2 else rows
    if (numbers[torch.searchsorted(numbers, edges).clamp(max=len(numbers) - 1)] == edges).all():
        return narrow  # a factor multiplies whole rows or columns
    restored, kept = narrow.clone(), torch.isin(narrow, dense)
    parts = {new / old for old, new in zip(dense.shape, narrow.shape, strict=True)} - {1.0}
    for factor in (part**power for part in parts for power in (1, 0.5, 0.25)):
        before = narrow / factor
        above = torch.searchsorted(numbers, before).clamp(1, len(numbers) - 1)
        nearest = torch.where(2 * before < numbers[above - 1] + numbers[above], numbers[above - 1], numbers[above])
        same = ~kept & ((nearest - before).abs() <= 1e-14 * before.abs())
        restored[same] = nearest[same]
    return restored


def makes_channels(module: nn.Module, name: str) -> bool:
    """Whether a tensor of a module makes outputs out of all inputs, and is no element-wise factor."""
    return name == "in_proj_weight" or (name == "weight" and isinstance(module, CONVOLUTION | nn.Linear))


@torch.no_grad()
def masked(model: nn.Module, narrow: nn.Module) -> nn.Module:
    """A copy of `model`, in its old shape, in which all that makes the filters that `narrow` lacks is zero."""
    model = copy.deepcopy(model)
    for path, module in model.named_modules():
        other = narrow.get_submodule(path)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.is_floating_point():
                continue
            if makes_channels(module, name):
                gone = removed_filters(tensor, module, other, name)
                if getattr(module, "transposed", False):
                    groups = tensor.unflatten(0, (module.groups, -1))  # (groups, C_in / groups, C_out / groups, ...)
                    for group, filters in zip(groups, gone.view(module.groups, -1), strict=True):
                        group[:, filters] = 0
                else:
                    tensor[gone] = 0
            elif tensor.shape != getattr(other, name).shape:
                tensor[~torch.isin(tensor, before_factors(tensor, getattr(other, name)))] = 0
    return model


class OverKeptChannels(TorchFunctionMode):
    """Takes the statistics of LayerNorm, GroupNorm and RMSNorm over those channels whose gamma is not zero."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.layer_norm:
            return layer_norm(*args, **kwargs)
        if function is F.rms_norm:
            return rms_norm(*args, **kwargs)
        return group_norm(*args, **kwargs) if function is F.group_norm else function(*args, **kwargs)


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    alive = weight if weight is not None else x.flatten(end_dim=-1 - len(normalized_shape)).abs().amax(0)
    result = normalize(x, (alive != 0).expand_as(x), tuple(range(-len(normalized_shape), 0)), eps)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def rms_norm(x, normalized_shape, weight, eps=None):
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = tuple(range(-len(normalized_shape), 0))
    return x * weight / ((x * (weight != 0)).square().sum(dims, keepdim=True) / (weight != 0).sum() + eps).sqrt()


def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    alive = weight if weight is not None else x.transpose(0, 1).flatten(1).abs().amax(1)
    alive, *affine = (
        None if vector is None else vector.view(-1, *[1] * (x.dim() - 2)) for vector in (alive, weight, bias)
    )
    groups = x.unflatten(1, (num_groups, -1))
    alive = (alive != 0).expand_as(x).unflatten(1, (num_groups, -1))
    result = normalize(groups, alive, tuple(range(2, groups.dim())), eps).flatten(1, 2)
    result = result if affine[0] is None else result * affine[0]
    return result if affine[1] is None else result + affine[1]


def normalize(x, alive, dims, eps):
    count = alive.sum(dims, keepdim=True).clamp(min=1)
    centred = (x - (x * alive).sum(dims, keepdim=True) / count) * alive
    return centred / (centred.square().sum(dims, keepdim=True) / count + eps).sqrt()


@torch.no_grad()
def largest_difference(model: nn.Module, narrow: nn.Module, example: Any, train: bool = False) -> float:
    """Between the outputs of two networks in one mode, without dropout, relative to the largest output."""
    outputs = []
    for network in (model, narrow):
        network = (copy.deepcopy(network) if train else network).train(train)  # what BatchNorm averages stays as it is
        for module in network.modules():
            if "drop" in type(module).__name__.lower() or type(module).__name__ == "StochasticDepth":
                module.eval()
        outputs.append([leaf for leaf in tree_leaves(call(network, example)) if isinstance(leaf, Tensor)])
    worst = 0.0
    for one, other in zip(*outputs, strict=True):
        assert one.shape == other.shape, f"outputs of shape {tuple(other.shape)} instead of {tuple(one.shape)}"
        scale = max(one.abs().max().item(), 1e-4)  # far below it all is rounding, as the mean of an InstanceNorm
        difference = (one - other).abs().max().item() / scale
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def difference_from_masked(model: nn.Module, narrow: nn.Module, example: Any, train: bool = False) -> float:
    """How far the narrow network is from `model` with the same filters zeroed."""
    with OverKeptChannels():
        dense = masked(model, narrow)
        return largest_difference(dense, narrow, example, train)


def assert_sizes_fit(model: nn.Module) -> None:
    """Every number that a layer was built with is that of its tensors."""
    for path, module in model.named_modules():
        sizes = {}
        if isinstance(module, CONVOLUTION):
            split, whole = module.weight.shape[:2]
            sizes = {"out_channels": split, "in_channels": whole * module.groups}
            if module.transposed:
                sizes = {"in_channels": split, "out_channels": whole * module.groups}
        elif isinstance(module, nn.Linear):
            sizes = {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
        elif isinstance(module, BATCH_NORM) and module.running_mean is not None:
            sizes = {"num_features": len(module.running_mean)}
        elif isinstance(module, nn.GroupNorm) and module.affine:
            sizes = {"num_channels": len(module.weight)}
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
            sizes = {"normalized_shape": tuple(module.weight.shape)}
        for name, size in sizes.items():
            assert getattr(module, name) == size, f"{path}.{name} is {getattr(module, name)}, not {size}"


def check_removal(
    model: nn.Module, example: Any, narrow: nn.Module, removed: dict[str, Tensor], tolerance: float = 1e-9
) -> float:
    """Asserts all that must hold of a network without the filters `removed`; returns the largest difference."""
    assert_sizes_fit(narrow)
    for path, filters in removed.items():
        module = attrgetter(path)(model)
        if isinstance(module, CONVOLUTION | nn.Linear):
            lacks = removed_filters(module.weight, module, narrow.get_submodule(path), "weight")
            assert torch.equal(lacks, filters), f"{path} lacks {lacks.tolist()}, said to be removed: {filters.tolist()}"
    differences = {train: difference_from_masked(model, narrow, example, train) for train in (False, True)}
    for train, difference in differences.items():
        assert difference <= tolerance, f"off by {difference:.1e} in {'train' if train else 'eval'} mode"
    assert can_be_trained(narrow, example) or not can_be_trained(model, example), "no gradients"
    return max(differences.values())


def can_be_trained(model: nn.Module, example: Any) -> bool:
    """Whether gradients can be had: a network that overwrites what they need raises RuntimeError."""
    try:
        leaves = tree_leaves(call(copy.deepcopy(model).train(), example))
        sum(leaf.square().mean() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad).backward()
    except RuntimeError:
        return False
    return True
