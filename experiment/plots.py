"""Figures, each a function of the JSON that a script wrote and of nothing else."""

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

# Okabe & Ito's colours, told apart by every kind of colour vision; line styles and markers say it once more.
DENSE = {"color": "#0072B2", "marker": "o", "label": "dense"}
PRUNED = {"color": "#D55E00", "marker": "s", "label": "pruned"}
SHADE = {"color": "#999999", "alpha": 0.2, "linewidth": 0}
STYLE = {
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@matplotlib.rc_context(STYLE)
def unstructured(run: dict[str, Any]) -> bytes:
    """The PNG of one run of unstructured_pruning.py: accuracy, sparsity over time and per layer, weights."""
    dense, pruned = run["dense"], run["pruned"]
    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(
        f"{100 * pruned['sparsity']:g} % of LeNet-5's weights pruned on MNIST: "
        f"{dense['test_accuracy']:.2f} % accuracy dense, {pruned['test_accuracy']:.2f} % pruned",
        fontsize=16,
    )
    (accuracy, schedule), (layers, weights) = figure.subplots(2, 2)
    steps_per_epoch = pruned["history"][0]["step"]
    cut_epochs = [cut["step"] / steps_per_epoch for cut in pruned["cuts"]]
    draw_accuracy(accuracy, dense, pruned, cut_epochs)
    draw_schedule(schedule, pruned, cut_epochs)
    draw_layers(layers, pruned["layers"])
    draw_weights(weights, dense["histogram"], pruned["histogram"])
    return png(figure)


@matplotlib.rc_context(STYLE)
def unstructured_sweep(sweep: dict[str, Any]) -> bytes:
    """The PNG of several runs of unstructured_pruning.py: accuracy against compression."""
    summary, seeds = sweep["summary"], len(sweep["arguments"]["seed"])
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    mean, std = summary["dense"].values()
    axes.axhline(mean, color=DENSE["color"], label="dense" if std is None else "dense, the band its standard deviation")
    if std is not None:
        axes.axhspan(mean - std, mean + std, **SHADE)
    points = sorted(summary["pruned"], key=lambda point: point["sparsity_target"])
    last = points[-1]
    total = sweep["runs"][0]["dense"]["nonzero_weights"]
    compression = [total / point["nonzero_weights"] for point in points]
    axes.errorbar(
        compression,
        [point["test_accuracy"]["mean"] for point in points],
        None if std is None else [point["test_accuracy"]["std"] for point in points],
        color=PRUNED["color"],
        marker=PRUNED["marker"],
        capsize=4,
        label="magnitude pruning",
    )
    axes.set(
        xscale="log",
        xlabel="compression (all weights / nonzero weights) and sparsity",
        ylabel="test accuracy (%)",
        title=f"LeNet-5 on MNIST without {100 * last['sparsity_target']:g} % of its weights: "
        f"{last['drop']['mean']:.2f} points of accuracy lost\n"
        + ("(one seed)" if std is None else f"(mean and sample standard deviation over {seeds} seeds)"),
    )
    labels = [f"{x:.3g}×\n{100 * point['sparsity_target']:g} %" for x, point in zip(compression, points, strict=True)]
    axes.set_xticks(compression, labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(loc="lower left")
    return png(figure)


def draw_accuracy(axes: Axes, dense: dict[str, Any], pruned: dict[str, Any], cut_epochs: list[float]) -> None:
    axes.axvspan(cut_epochs[0], cut_epochs[-1], label="weights are being cut", **SHADE)
    for record, style in ((dense, DENSE), (pruned, PRUNED)):
        history = record["history"]
        axes.plot([epoch["epoch"] for epoch in history], [epoch["test_accuracy"] for epoch in history], **style)
    axes.set(title="Accuracy with and without pruning", xlabel="epoch", ylabel="test accuracy (%)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)  # below: the curves may run anywhere


def draw_schedule(axes: Axes, pruned: dict[str, Any], cut_epochs: list[float]) -> None:
    last_epoch = pruned["history"][-1]["epoch"]
    planned, actual = ([100 * cut[kind] for cut in pruned["cuts"]] for kind in ("planned", "actual"))
    axes.plot(
        [0, cut_epochs[0], *cut_epochs, last_epoch], [0, 0, *planned, planned[-1]], color="#009E73", label="planned"
    )
    axes.plot(cut_epochs, actual, ".", color=PRUNED["color"], label="actual, after each cut")
    axes.set(title="Sparsity follows the polynomial decay", xlabel="epoch", ylabel="sparsity (% of weights)")
    axes.set_ylim(0, 1.1 * max(planned[-1], 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right")


def draw_layers(axes: Axes, layers: list[dict[str, Any]]) -> None:
    names = [layer["layer"].removesuffix(".weight") for layer in layers]
    sparsity = [100 * (1 - layer["nonzero"] / layer["weights"]) for layer in layers]
    bars = axes.barh(names, sparsity, color=PRUNED["color"])
    labels = [f"{layer['nonzero']:,} of {layer['weights']:,} left" for layer in layers]
    axes.bar_label(bars, labels, padding=4)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="How sparse each layer has become", xlabel="sparsity (% of the layer's weights)", xlim=(0, 165))
    axes.set_xticks(range(0, 101, 20))


def draw_weights(axes: Axes, dense: dict[str, Any], pruned: dict[str, Any]) -> None:
    axes.stairs(pruned["counts"], pruned["edges"], fill=True, color=PRUNED["color"], alpha=0.6, label="pruned")
    axes.stairs(dense["counts"], dense["edges"], color=DENSE["color"], linewidth=1.8, label="dense")
    axes.set(
        title="What is left are the larger weights",
        xlabel="|weight|",
        ylabel="nonzero weights per bin",
        xscale="log",
        xlim=(1e-5, 2),
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left")


def png(figure: Figure) -> bytes:
    """The figure's PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
