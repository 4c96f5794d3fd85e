"""Magnitude pruning: masks over the weights of a network, and keeping the masked weights at zero.

Masks are a plain dict, name of the parameter -> boolean tensor, False where the weight is pruned. The network itself
is never wrapped or changed in kind: its parameters stay plain tensors throughout, some of whose elements are 0.

    masks = dense_masks(model)
    hold = keep_at_zero(model, masks, optimizer)
    for step, batch in enumerate(batches):
        if schedule.prunes_at(step):
            update_masks(model, masks, schedule.sparsity(step))
        ...; optimizer.step()
    make_permanent(model, masks, hold)

Names are those of the plain network, without what torch.compile or DistributedDataParallel put before them. A layer
left out of the masks is not pruned.
"""

import math
import warnings
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.linalg import vector_norm
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from pruning.pattern import parse, within
from pruning.selection import Layer, array, find_weakest, refuse_nan

METHODS = ("magnitude", "obd", "random")
SCOPES = ("global", "layer", "lamp")  # or a pattern, as "2:4"

Masks = dict[str, Tensor]

PRUNABLE = (nn.modules.conv._ConvNd, nn.Linear)
PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}  # hold the plain network
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all convolutions and linear layers by name, each once; no biases, no normalisation.

    Raises ValueError where such a weight is no parameter of its own but computed from others.
    """
    prunable = set()
    for name, module in model.named_modules():
        if isinstance(module, PRUNABLE):
            if "weight" not in module._parameters:
                raise ValueError(
                    f"the weight of {name or type(module).__name__} is computed from other tensors and cannot be "
                    "masked; first remove its weight_norm, spectral_norm, torch.nn.utils.prune or parametrization"
                )
            prunable.add(id(module.weight))
    return {plain_name(model, name): value for name, value in model.named_parameters() if id(value) in prunable}


def plain_name(model: nn.Module, name: str) -> str:
    """A parameter's name without the attributes under which wrappers hold the network that they wrap."""
    parts = name.split(".")
    if WRAPPERS.isdisjoint(parts):
        return name
    owners = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    return ".".join(
        part
        for part, owner in zip(parts, owners, strict=True)
        if part not in WRAPPERS or (part == "module" and not isinstance(owner, PARALLEL))
    )


def sparsity(model: nn.Module) -> float:
    """The fraction of the prunable weights that are exactly 0."""
    weights = prunable_weights(model).values()
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def dense_masks(model: nn.Module) -> Masks:
    """Masks that are True everywhere, one of each prunable weight. Raises ValueError for a network without any."""
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable_weights(model).items()}
    if not masks:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer with a weight of its own")
    return masks


@torch.no_grad()
def update_masks(
    model: nn.Module,
    masks: Masks,
    sparsity: float | Mapping[str, float],
    scope: str = "global",
    method: str = "magnitude",
    generator: torch.Generator | None = None,
    squared_gradients: Mapping[str, Tensor] | None = None,
) -> None:
    """Prune the weights of least magnitude until a fraction `sparsity` of them is 0; the masks change in place.

    scope "global": weights are ranked over the whole network, and exactly round(sparsity * n) of its n are pruned.
    scope "layer": weights are ranked in each layer, and exactly round(sparsity * n) of its n are pruned.
    scope "lamp": as global, with |w| replaced by its layer-adaptive score, see `selection.lamp_scores`.
    scope "N:M", as "2:4": as layer, but the N strongest of every M neighbouring inputs of a filter are pruned last.
    From sparsity 1 - N/M on at most N of every M are left. Layers whose inputs are no multiple of M stay dense.
    With one sparsity per layer, by the name of its mask, each layer is pruned to its own.

    method "magnitude": weights are ranked by |w|.
    method "obd": by saliency E[g^2] w^2 / 2, as in Optimal Brain Damage (LeCun et al. 1989, §2). For the curvature
    stand `squared_gradients`, those of `average_squared_gradients`. Theis et al. 2018 (arXiv:1801.05787, §2.1) take
    single examples' gradients, whose mean square is in proportion to that of batches where the full gradient is near 0.
    method "random": by numbers drawn with `generator` on the CPU, a control; scope "lamp" is then as global.

    Ties are broken by position: earlier layers, then earlier elements, first. A pruned weight stays pruned, and the
    strongest weight of each layer is kept, even where that leaves more weights than the sparsity asks for. Linear time.
    Raises ValueError for an unknown scope or method, for "obd" without squared gradients, for a sparsity outside
    [0, 1), for masks that do not fit the network, for a pattern that fits no layer, and where a weight to be ranked is
    NaN.
    """
    squares = squared_gradients or {}
    by_layer = check_arguments(masks, sparsity, scope, method, squares)
    weights, ranked = prunable_weights(model), []
    for name, weight, mask in matched(weights, masks):
        values = weight.detach()
        if method == "random":
            values = torch.rand(weight.numel(), generator=generator).view(weight.shape).to(weight.device)
        ranked.append((name, values, mask, squares[name] if method == "obd" else None))
    if pattern := parse(scope):
        ranked = in_pattern(inputs_of_filters(model, weights, masks), ranked, pattern, by_layer)
    layers = [Layer.of(*each) for each in ranked]
    if scope == "layer" or pattern or isinstance(sparsity, Mapping):
        cuts = [cut for layer in layers for cut in find_weakest([layer], by_layer[layer.name])]
    else:
        cuts = find_weakest(layers, sparsity, lamp=scope == "lamp" and method != "random")
    for cut in cuts:
        cut.apply()
    for layer in layers if pattern else ():
        masks[layer.name] &= torch.as_tensor(layer.mask)
    if hold := hold_of(model):
        hold.put_in_force(masks)
    apply_masks(weights, masks)


def check_arguments(
    masks: Masks, sparsity: float | Mapping[str, float], scope: str, method: str, squares: Mapping[str, Tensor]
) -> dict[str, float]:
    """The sparsity of each layer. Raises ValueError as `update_masks` does, for what it is called with."""
    if scope not in SCOPES and not parse(scope):
        raise ValueError(f"scope {scope!r}; allowed: {', '.join(SCOPES)}, or N:M with N below M, as 2:4")
    if method not in METHODS:
        raise ValueError(f"method {method!r}; allowed: {', '.join(METHODS)}")
    if method == "obd" and not masks.keys() <= squares.keys():
        raise ValueError('method "obd" without squared_gradients; allowed: one of each mask')
    if isinstance(sparsity, Mapping) and not masks.keys() <= sparsity.keys():
        raise ValueError("sparsity by layer; allowed: one of each mask")
    by_layer = {name: sparsity[name] if isinstance(sparsity, Mapping) else sparsity for name in masks}
    for fraction in by_layer.values():
        if not 0 <= fraction < 1:
            raise ValueError(f"sparsity {fraction}; allowed: at least 0, below 1")
    return by_layer


def in_pattern(
    inputs: dict[str, tuple[int, int]], ranked: list[tuple], pattern: tuple[int, int], by_layer: dict[str, float]
) -> list[tuple]:
    """Those of the layers to be ranked whose inputs an N:M pattern fits, with their scores and masks under it.

    `inputs` are those of `inputs_of_filters`; `ranked` what `Layer.of` takes. Raises ValueError if it fits none, and
    where a weight is NaN.
    """
    fitting = []
    for name, values, mask, curvature in ranked:
        axis, count = inputs[name]
        if count % pattern[1] == 0:
            scores = values.abs().to(torch.promote_types(values.dtype, torch.float32))  # 16 bits underflow
            scores = scores if curvature is None else scores * curvature.sqrt()
            refuse_nan(name, scores[mask])
            fitting.append((name, *within(scores, mask, axis, pattern, by_layer[name])))
    if not fitting:
        counts = ", ".join(str(count) for _, count in inputs.values())
        allowed = f"an M that divides one of {counts} inputs"
        raise ValueError(f"the pattern {pattern[0]}:{pattern[1]} fits no layer; allowed: {allowed}")
    return fitting


def inputs_of_filters(model: nn.Module, weights: dict[str, nn.Parameter], masks: Masks) -> dict[str, tuple[int, int]]:
    """By the name of each mask, the axis along which its filters' inputs stand and how many a filter has."""
    found = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            found[id(module.weight)] = 1, module.in_features
        elif isinstance(module, PRUNABLE):
            found[id(module.weight)] = 0 if module.transposed else 1, module.in_channels // module.groups
    return {name: found[id(weight)] for name, weight, _ in matched(weights, masks)}


def matched(weights: dict[str, nn.Parameter], masks: Masks) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Name, weight and mask of each mask. Raises ValueError for a mask that does not fit any weight."""
    bare = {bare_name(name): weight for name, weight in weights.items()}
    for name, mask in masks.items():
        weight = weights.get(name, bare.get(bare_name(name)))
        if weight is None:
            raise ValueError(f"a mask of {name}, which is no weight of a convolution or linear layer here")
        if (mask.dtype, mask.shape, mask.device) != (torch.bool, weight.shape, weight.device):
            raise ValueError(
                f"the mask of {name} is {mask.dtype} {tuple(mask.shape)} on {mask.device}; "
                f"allowed: torch.bool {tuple(weight.shape)} on {weight.device}, like the weight"
            )
        yield name, weight, mask


def bare_name(name: str) -> str:
    """What is the same of a parameter's name in and outside of all wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def average_squared_gradients(model: nn.Module, optimizer: Optimizer, decay: float = 0.99) -> dict[str, Tensor]:
    """The running average of each prunable weight's squared gradient, by name, at first 0.

    Every `optimizer.step()` moves the averages in place, by 1 - `decay` of the way to the squared gradient of its
    batch: long enough to be steady, short enough to forget the network before the latest pruning. A step whose
    gradients are not all finite is left out: torch.amp.GradScaler skips it too. Its scale is taken out of gradients
    that a fused optimiser gets scaled. Raises ValueError where a weight is frozen.
    """
    weights = prunable_weights(model)
    for name, weight in weights.items():
        if not weight.requires_grad:
            raise ValueError(f"{name} is frozen, so that it has no gradient to go by")
    averages = {
        name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))  # 16 bits underflow
        for name, weight in weights.items()
    }

    @torch.no_grad()
    def average(*_: object) -> None:
        gradients = {name: weight.grad for name, weight in prunable_weights(model).items() if weight.grad is not None}
        scale = getattr(optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else scale
        largest = [vector_norm(gradient.to(averages[name]), math.inf) for name, gradient in gradients.items()]
        if largest and not (torch.stack(largest) / scale).square().isfinite().all():
            return
        for name, mean in averages.items():
            if name in gradients:
                mean.lerp_((gradients[name].to(mean) / scale).square(), 1 - decay)
            else:
                mean.mul_(decay)

    optimizer.register_step_pre_hook(average)
    return averages


class Hold:
    """What keeps the masked weights of one network at 0; a copy of the network has a hold of its own, on its weights.

    `masks`: those in force, the latest first, which count where several have a name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.masks: list[Masks] = []
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        watch_optimizers()
        HOLDS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "masks": self.masks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies and pickles: a copied network is held like the original, whichever optimiser trains it."""
        self.__init__(state["model"])
        self.masks = state["masks"]

    def put_in_force(self, masks: Masks) -> None:
        """Let these masks count from now on. Older ones stay in force for the layers that these leave out."""
        self.masks = [masks, *(old for old in self.masks if old is not masks and old.keys() - masks.keys())]

    def after_step(self, optimizer: Optimizer) -> None:
        """Set the masked weights to 0, if the optimiser is one to watch or has any of the network's parameters."""
        parameters = set(self.model.parameters())
        if optimizer in self.optimizers or any(
            parameter in parameters for group in optimizer.param_groups for parameter in group["params"]
        ):
            masks = {name: mask for masks in reversed(self.masks) for name, mask in masks.items()}
            apply_masks(prunable_weights(self.model), masks)

    def remove(self) -> None:
        """End it. The weights keep their values."""
        HOLDS.discard(self)
        self.model.__dict__.pop("_hold", None)


HOLDS: weakref.WeakSet[Hold] = weakref.WeakSet()  # of all networks, for the one hook that all optimisers have


@cache
def watch_optimizers() -> None:
    """Let every step of every optimiser, whenever it is made, end with the masked weights at 0."""
    register_optimizer_step_post_hook(lambda optimizer, *_: [hold.after_step(optimizer) for hold in list(HOLDS)])


def keep_at_zero(model: nn.Module, masks: Masks, optimizer: Optimizer) -> Hold:
    """From now on, every `optimizer.step()` ends with the masked weights at 0, whatever momentum or decay did.

    So does every step of any other optimiser of the same weights. What `masks` holds at the time of the step counts,
    after `update_masks` with other masks what those hold; parameters are looked up by name, so that new ones of
    `load_state_dict(assign=True)` are kept too, and a copy of the network keeps its own weights at 0. The hold that
    is returned, one for each network, ends all this by `hold.remove()`, as `make_permanent` does.
    """
    if not (isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_post_hooks")):
        raise TypeError(f"optimizer {type(optimizer).__name__}; allowed: a torch.optim.Optimizer, initialised as such")
    for _ in matched(prunable_weights(model), masks):
        pass  # masks that do not fit are refused now, not after a step
    hold = hold_of(model) or Hold(unwrapped(model))
    hold.model.__dict__["_hold"] = hold  # past nn.Module, and copied with the network
    hold.put_in_force(masks)
    hold.optimizers.add(optimizer)
    return hold


def hold_of(model: nn.Module) -> Hold | None:
    return unwrapped(model).__dict__.get("_hold")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, without torch.compile and DistributedDataParallel around it."""
    while True:
        if isinstance(model, PARALLEL):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


@torch.no_grad()
def apply_masks(weights: dict[str, nn.Parameter], masks: Masks) -> None:
    """Set every masked weight to 0, whatever it is: the product of the bits with 0 makes 0 of NaN and of -0.0, too."""
    for _, weight, mask in matched(weights, masks):
        bits = array(weight.detach().view(INTEGERS[weight.element_size()]))
        bits *= array(mask)
        increment_version(weight)  # so that autograd notices, though numpy may have done it


@torch.no_grad()
def make_permanent(model: nn.Module, masks: Masks, hold: Hold) -> None:
    """End the hold and leave the plain network: same modules, same state_dict keys, its masked weights 0 for good.

    Warns where they were not 0 before, as when other masks were in force.
    """
    hold.remove()
    if own := hold_of(model):
        own.remove()
    weights = prunable_weights(model)
    alive = sum(int((weight * ~mask).count_nonzero()) for _, weight, mask in matched(weights, masks))
    if alive:
        warnings.warn(f"{alive} masked weights were not 0: other masks than these were kept at zero", stacklevel=2)
    apply_masks(weights, masks)
