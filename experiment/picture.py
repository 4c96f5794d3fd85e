"""A picture of the LeNet-5 that is left where only few weights are: its pixels, its kernels, its connections."""

import copy

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiment.plots import DENSE, PRUNED, STYLE, png

SIGNS = {"positive": DENSE["color"], "negative": PRUNED["color"]}
COLUMNS = ("kernels of conv1", "channels of conv2", "neurons of fc1", "digits")


@torch.no_grad()
@matplotlib.rc_context(STYLE | {"axes.grid": False})
def network(model: nn.Module, images: Tensor, accuracy: float) -> bytes:
    """The PNG of a compacted MnistCNN, in which every unit is alive, and of its test accuracy in percent.

    Left, how much of each pixel reaches an output, with the mean of `images` `(N, 1, 28, 28)`; right, each kernel of
    the first layer as an image and each connection as a line, the wider the larger its weights.
    """
    model = copy.deepcopy(model).cpu()
    figure = Figure(figsize=(13, 8), layout="constrained")
    counts = [
        sum(int(each.count_nonzero()) for each in model.parameters() if (each.dim() == 1) == one) for one in (0, 1)
    ]
    left = "{:,} weights and {:,} biases".format(*counts)
    figure.suptitle(f"What is left of LeNet-5: {left}, {accuracy:.2f} % accuracy on MNIST", fontsize=16)
    pixels, units = figure.subplots(1, 2, width_ratios=[1, 1.8])
    draw_pixels(pixels, pixel_weights(model).numpy(), images.float().mean((0, 1)).cpu().numpy())
    weights = [
        model.conv2.weight.flatten(2),  # (C_out, C_in, 25)
        model.fc1.weight.unflatten(1, (-1, 16)),  # (neurons, channels, 16 places)
        model.fc2.weight.unsqueeze(2),  # (10, neurons, 1)
    ]
    draw_units(units, model.conv1.weight[:, 0].numpy(), [each.numpy() for each in weights])
    return png(figure)


def pixel_weights(model: nn.Module) -> Tensor:
    """For each pixel `(28, 28)` the sum, over all its paths to an output, of the products of the weights' magnitudes.

    A pooled place may come from any of its four, so each path leads to all of them.
    """
    x = (model.fc2.weight.abs().sum(0) @ model.fc1.weight.abs()).view(1, -1, 4, 4)
    for conv in (model.conv2, model.conv1):
        x = F.interpolate(x, scale_factor=2)
        x = F.conv_transpose2d(x, conv.weight.abs())  # (1, C, 12, 12), then (1, 1, 28, 28)
    return x[0, 0]


def draw_pixels(axes: Axes, weights: np.ndarray, digit: np.ndarray) -> None:
    image = axes.imshow(np.ma.masked_equal(weights / weights.max(), 0), cmap="viridis", vmin=0, vmax=1)
    axes.contour(digit, levels=digit.max() * np.array([0.3, 0.6]), colors="white", linewidths=1)
    axes.figure.colorbar(image, ax=axes, location="bottom", label="weight of the pixel / the largest", pad=0.02)
    axes.set(title=f"{np.count_nonzero(weights)} of {weights.size} pixels are looked at\n(lines: the mean image)")
    axes.set(xticks=[], yticks=[], anchor="S")


def draw_units(axes: Axes, kernels: np.ndarray, weights: list[np.ndarray]) -> None:
    counts = [len(kernels), *(len(layer) for layer in weights)]
    heights = [(np.arange(count) + 0.5) / count for count in counts]
    for column, layer in enumerate(weights):
        sums, sizes = layer.sum(2), np.abs(layer).sum(2)
        ends, begins = sizes.nonzero()
        lines = [
            [(column + 0.06, heights[column][begin]), (column + 0.94, heights[column + 1][end])]
            for end, begin in zip(ends, begins, strict=True)
        ]
        widths = 0.3 + 2.5 * sizes[ends, begins] / sizes.max()
        colors = [SIGNS["positive" if value > 0 else "negative"] for value in sums[ends, begins]]
        axes.add_collection(LineCollection(lines, linewidths=widths, colors=colors, alpha=0.6))
        if column:
            axes.plot([column] * counts[column], heights[column], "o", color="black", markersize=3)
    half = 0.4 / len(kernels)
    for kernel, height in zip(kernels, heights[0], strict=True):
        bound, place = np.abs(kernel).max(), (-0.07, 0.05, height - half, height + half)
        axes.imshow(kernel, cmap="RdBu", vmin=-bound, vmax=bound, extent=place, aspect="auto", zorder=3)
    for digit, height in enumerate(heights[3]):
        axes.text(3, height, str(digit), ha="center", va="center", fontsize=14)
    for sign, color in SIGNS.items():
        axes.plot([], [], color=color, label=f"weights {sign} in sum")
    names = [f"{count} {name}" if name != "digits" else name for count, name in zip(counts, COLUMNS, strict=True)]
    axes.set(xlim=(-0.12, 3.1), ylim=(1.01, -0.01), yticks=[], title="What is connected (wider: larger weights)")
    axes.set_xticks(range(4), names, fontsize=11)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
