"""Figures, each a function of the JSON that a script has written and of nothing else."""

import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from experiment.report import accuracy_title

# Okabe & Ito's colours, told apart by every kind of colour vision; line styles and markers say it once more.
DENSE = {"color": "#0072B2", "marker": "o", "label": "dense"}
PRUNED = {"color": "#D55E00", "marker": "s", "label": "pruned"}
LONGER = {"color": "#56B4E9", "marker": "^", "linestyle": "--", "label": "dense, fine-tuned as long"}
METHODS = {
    "magnitude": {**PRUNED, "label": "magnitude"},
    "obd": {"color": "#56B4E9", "marker": "D", "label": "saliency (OBD)"},
    "l2": {**PRUNED, "label": "L2 norm"},
    "l1": {"color": "#56B4E9", "marker": "D", "label": "L1 norm"},
    "bn_scale": {"color": "#E69F00", "marker": "P", "label": "scale of BatchNorm"},
    "taylor": {"color": "#8C564B", "marker": "h", "label": "Taylor"},
    "fpgm": {"color": "#000000", "marker": "*", "label": "distance to the others (FPGM)"},
    "layerwise_random": {
        "color": "#009E73",
        "marker": "^",
        "linestyle": "--",
        "label": "layer-wise random",
    },
    "random": {"color": "#CC79A7", "marker": "v", "linestyle": ":", "label": "random"},
}
LAYERS = [
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "#009E73", "linestyle": "-."},
    {"color": "#CC79A7", "linestyle": ":"},
    {"color": "#E69F00", "linestyle": "-"},
    {"color": "#56B4E9", "linestyle": "--"},
]
SCOPES = [  # after the first, which looks like its method
    {"color": "#E69F00", "marker": "D", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
]
# What others have reached with LeNet-5 on MNIST: times fewer weights, test accuracy (%). Sources: results/README.md.
PUBLISHED = {
    "Han 2015": (12, 99.23),
    "ADMM 2018": (71, 99.2),
    "DNS 2016": (108, 99.09),
    "SWS 2017": (162, 99.03),
    "pADMM 2018": (246, 99.2),
    "SparseVD 2017": (280, 99.25),
}
CONTROLS = {
    "ticket": {"color": "#8C564B", "marker": "P", "linestyle": ":", "label": "lottery ticket, same initial weights"},
    "scratch": {"color": "#E69F00", "marker": "X", "linestyle": "-.", "label": "from scratch, other initial weights"},
}
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


def look(method: str) -> dict[str, str]:
    """Colour, marker and label of a method; one that is not in METHODS is black and labelled by its name."""
    return METHODS.get(method, {"color": "#000000", "marker": "p", "label": method})


def unstructured(report: dict[str, Any]) -> bytes:
    """The PNG of unstructured_pruning.py's report, on one run or several."""
    return unstructured_run(report) if len(report["runs"]) == 1 else unstructured_sweep(report)


def structured(report: dict[str, Any]) -> bytes:
    """The PNG of structured_pruning.py's report, on one run or several."""
    return structured_run(report) if len(report["runs"]) == 1 else structured_sweep(report)


@matplotlib.rc_context(STYLE)
def unstructured_run(report: dict[str, Any]) -> bytes:
    """One run of unstructured_pruning.py: accuracy, sparsity over time and per layer, weights."""
    (run,) = report["runs"]
    dense, pruned = run["dense"], run["pruned"]
    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(
        f"{100 * pruned['sparsity']:g} % of LeNet-5's weights pruned on MNIST: "
        f"{dense['test_accuracy']:.2f} % accuracy dense, {pruned['test_accuracy']:.2f} % pruned",
        fontsize=16,
    )
    (accuracy, schedule), (layers, weights) = figure.subplots(2, 2)
    steps_per_epoch = pruned["history"][0]["step"]
    update_epochs = [update["step"] / steps_per_epoch for update in pruned["mask_updates"]]
    draw_accuracy(accuracy, dense, pruned, update_epochs)
    accuracy.set_ylabel(accuracy_title(report["arguments"]))
    draw_schedule(schedule, pruned, update_epochs)
    draw_layers(layers, pruned["layers"])
    draw_weights(weights, dense["histogram"], pruned["histogram"])
    return png(figure)


@matplotlib.rc_context(STYLE)
def structured_run(report: dict[str, Any]) -> bytes:
    """One run of structured_pruning.py: accuracy, filters and importances per layer, costs."""
    (run,) = report["runs"]
    dense, pruned = run["dense"], run["pruned"]
    removed = 1 - pruned["parameters"] / dense["parameters"]
    figure = Figure(figsize=(13, 9), layout="constrained")
    name = look(run["method"])["label"]
    beside = f", {run['longer']['test_accuracy']:.2f} % {LONGER['label']}" if "longer" in run else ""
    macs = f"{dense['macs'] / pruned['macs']:.2f}× fewer MACs"
    figure.suptitle(
        f"{100 * removed:.1f} % of a CNN's parameters pruned by {name} on CIFAR-10, {macs}:\n"
        f"{pruned['test_accuracy']:.2f} % accuracy{beside}",
        fontsize=16,
    )
    (accuracy, layers), (scores, costs) = figure.subplots(2, 2)
    draw_fine_tuning(accuracy, run)
    accuracy.set_ylabel(accuracy_title(report["arguments"]))
    draw_filters(layers, run["layers"])
    draw_scores(scores, run, report["arguments"]["threshold_mode"])
    draw_costs(costs, dense, pruned)
    return png(figure)


def unstructured_sweep(report: dict[str, Any]) -> bytes:
    """Several runs of unstructured_pruning.py: accuracy against compression."""
    total = report["runs"][0]["dense"]["nonzero_weights"]
    weights = Scale(
        "compression (all weights / nonzero weights) and sparsity",
        lambda point: total / point["nonzero_weights"]["mean"],
        lambda point: f"\n{100 * point['sparsity_target']:.4g} %",
    )
    return sweep_png(
        report,
        [weights],
        lambda point: f"LeNet-5 on MNIST without {100 * point['sparsity_target']:.4g} % of its weights",
        by_error=True,
        published=PUBLISHED,
    )


def structured_sweep(report: dict[str, Any]) -> bytes:
    """Several runs of structured_pruning.py: accuracy against parameters, multiply-adds and time."""
    total, summary = report["runs"][0]["dense"]["parameters"], report["summary"]["pruned"]

    def speed_up(point: dict[str, Any]) -> float:
        """That of all points of one shape, which differ by the noise of the measurement alone."""
        return statistics.mean(
            each["speed_up_256"]["mean"] for each in summary if each["parameters"] == point["parameters"]
        )

    scales = [
        Scale(
            "times fewer parameters, and those left",
            lambda point: total / point["parameters"]["mean"],
            lambda point: f"\n{point['parameters']['mean']:,.0f}",
        ),
        Scale("times fewer MACs", lambda point: point["macs_reduction"]["mean"]),
        Scale("speedup at batch 256", speed_up),
    ]
    return sweep_png(
        report,
        scales,
        lambda point: f"A CNN on CIFAR-10, {100 * point['parameters']['mean'] / total:.0f} % of its parameters left",
    )


@dataclass(frozen=True)
class Scale:
    """What accuracy is drawn against: `of` a point of the summary, in multiples; `label` says more at its tick."""

    name: str
    of: Callable[[dict[str, Any]], float]
    label: Callable[[dict[str, Any]], str] = lambda point: ""


@matplotlib.rc_context(STYLE)
def sweep_png(
    report: dict[str, Any],
    scales: list[Scale],
    title: Callable[[dict[str, Any]], str],
    by_error: bool = False,
    published: dict[str, tuple[float, float]] | None = None,
) -> bytes:
    """Accuracy against each scale, a curve for each method and scope; the title tells the most pruned point of the
    first.

    With `by_error` the accuracies stand where the logarithms of the errors would: 90, 99 and 99.9 % equally far apart.
    `published` are points of others, on the first scale.
    """
    figure = Figure(figsize=(9 if len(scales) == 1 else 4.4 * len(scales), 6), layout="constrained")
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    points = sorted(report["summary"]["pruned"], key=scales[0].of)
    # The first --method and --scope are those that a sweep is about.
    curves = {
        (method, scope): [point for point in points if (point["method"], point.get("scope")) == (method, scope)]
        for method in report["arguments"]["method"]
        for scope in report["arguments"].get("scope", [None])
    }
    for axes, scale in zip(panels, scales, strict=True):
        draw_sweep(axes, report, curves, scale)
    if published:
        draw_published(panels[0], published)
    mean, std = report["summary"]["dense"].values()
    seeds = f"mean, sample standard deviation and, as dots, each of {len(report['arguments']['seed'])} seeds"
    (method, scope), first = next(iter(curves.items()))
    last, by = first[-1], ""
    if len(curves) > 1:
        by = f", {curve_style(method, scope, report['arguments'])['label']}"
    drop = last.get("drop", last.get("drop_from_baseline"))["mean"]
    change = f"{drop:.2f} points of accuracy lost" if drop >= 0 else f"{-drop:.2f} points of accuracy gained"
    figure.suptitle(f"{title(last)}{by}: {change}\n({'one seed' if std is None else seeds})", fontsize=13)
    panels[0].set_ylabel(accuracy_title(report["arguments"]))
    if by_error:
        panels[0].set_yscale("function", functions=(error_height, accuracy_at))
        panels[0].set_ylim(top=accuracy_at(error_height(mean) + 0.3))
        bottom, top = panels[0].get_ylim()
        ticks = FixedLocator([20, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9])
        panels[0].yaxis.set_major_locator(ticks if top - bottom > 1 else MaxNLocator(5))
    # Below: a random method may fall anywhere.
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(scales))
    return png(figure)


def draw_sweep(
    axes: Axes, report: dict[str, Any], curves: dict[tuple[str, str | None], list[dict[str, Any]]], scale: Scale
) -> None:
    mean, std = report["summary"]["dense"].values()
    axes.axhline(mean, color=DENSE["color"], label="dense" if std is None else "dense (band: ± standard deviation)")
    if std is not None:
        axes.axhspan(mean - std, mean + std, **SHADE)
    first = next(iter(curves.values()))
    if "longer_accuracy" in first[0]:
        axes.axhline(first[0]["longer_accuracy"]["mean"], color=DENSE["color"], linestyle="--", label=LONGER["label"])
    for (method, scope), chosen in curves.items():
        style = curve_style(method, scope, report["arguments"])
        draw_curve(axes, chosen, scale.of, "test_accuracy", **style)
        for point in chosen:
            seeds = [run["pruned"]["test_accuracy"] for run in report["runs"] if is_at(run, point)]
            axes.plot([scale.of(point)] * len(seeds), seeds, ".", color=style["color"], markersize=5)
    for control, style in CONTROLS.items():
        if f"{control}_accuracy" in first[0]:
            draw_curve(axes, first, scale.of, f"{control}_accuracy", **style)
    places = [scale.of(point) for chosen in curves.values() for point in chosen]
    # The dense network, at 1, has a place unless it would crowd the points at the other end.
    low = 0.97 * min([1, *places]) if min(places) < 30 else 0.7 * min(places)
    high = 1.1 * max(places)
    axes.set(xscale="log", xlabel=scale.name, xlim=(low, high))
    ticks, closest = {1.0: "1×"} if low < 1 else {}, (high / low) ** 0.12  # a label takes up to an eighth of the axis
    for point in first:
        place = scale.of(point)
        touches = 1 < place < closest * max(ticks, default=1)  # the tick before; its label would be written over
        ticks[place] = "" if touches else f"{float(f'{place:.3g}'):,g}×{scale.label(point)}"
    axes.set_xticks([*ticks], ticks.values(), fontsize=11)
    axes.xaxis.set_minor_locator(NullLocator())


def curve_style(method: str, scope: str | None, arguments: dict[str, Any]) -> dict[str, str]:
    """How the curve of a method and a scope looks; where there are several scopes its label names it, too."""
    style, scopes = look(method), arguments.get("scope", [None])
    if len(scopes) == 1:
        return style
    place, label = scopes.index(scope), {"label": f"{style['label']}, {scope}"}
    by_scope = SCOPES[(place - 1) % len(SCOPES)] if place else {}
    color = {"color": style["color"]} if len(arguments["method"]) > 1 else {}  # then colours tell methods apart
    return {**style, **by_scope, **color, **label}


def draw_published(axes: Axes, published: dict[str, tuple[float, float]]) -> None:
    """Grey stars, as far as the axis reaches or little further; what their letters mean is said below the axis."""
    low, high = axes.get_xlim()
    shown = [(name, *point) for name, point in published.items() if low < point[0] < 1.5 * high]
    names = []
    for letter, (name, ratio, accuracy) in zip("abcdef", shown, strict=False):
        names.append(f"{letter} {name}")
        axes.plot(ratio, accuracy, "*", color="#666666", markersize=8)
        axes.annotate(letter, (ratio, accuracy), (0, -15), textcoords="offset points", ha="center", color="#666666")
    axes.set_xlim(low, max([high, *(1.1 * ratio for _, ratio, _ in shown)]))
    if names:
        axes.set_xlabel(f"{axes.get_xlabel()}\npublished: {', '.join(names)}", linespacing=1.6, fontsize=11)


def is_at(run: dict[str, Any], point: dict[str, Any]) -> bool:
    """True for the runs, one of each seed, that a point of the summary is about."""
    return all(run[name] == value for name, value in point.items() if not isinstance(value, dict))


def error_height(accuracy: np.ndarray) -> np.ndarray:
    """How high an accuracy in percent stands by the logarithm of its error, which counts as 0.01 at least."""
    return -np.log10(np.maximum(100 - accuracy, 0.01))


def accuracy_at(height: np.ndarray) -> np.ndarray:
    """The accuracy that stands at `height`."""
    return 100 - 10.0**-height


@matplotlib.rc_context(STYLE)
def sensitivity(report: dict[str, Any]) -> bytes:
    """The PNG of structured_pruning.py --sensitivity: accuracy against how much of one layer is pruned."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(report["test_accuracy"], color="black", linewidth=1, label="dense")
    for style, marker, layer in zip(LAYERS, "osD^vP", report["layers"], strict=True):
        pruned = [100 * (1 - point["kept"] / layer["filters"]) for point in layer["points"]]
        accuracies = [point["test_accuracy"] for point in layer["points"]]
        axes.plot(pruned, accuracies, marker=marker, label=layer["layer"], **style)
    axes.set(
        title="One layer pruned, without fine-tuning",
        xlabel="filters removed (% of the layer)",
        ylabel=accuracy_title(report["arguments"]),
    )
    axes.legend(loc="lower left")
    return png(figure)


def draw_curve(
    axes: Axes,
    points: list[dict[str, Any]],
    compression: Callable[[dict[str, Any]], float],
    quantity: str,
    **style: str,
) -> None:
    mean, std = ([point[quantity][kind] for point in points] for kind in ("mean", "std"))
    axes.errorbar([compression(point) for point in points], mean, None if None in std else std, capsize=4, **style)


def draw_accuracy(axes: Axes, dense: dict[str, Any], pruned: dict[str, Any], update_epochs: list[float]) -> None:
    axes.axvspan(update_epochs[0], update_epochs[-1], label="masks are updated", **SHADE)
    for record, style in ((dense, DENSE), (pruned, PRUNED)):
        history = record["history"]
        axes.plot([epoch["epoch"] for epoch in history], [epoch["test_accuracy"] for epoch in history], **style)
    axes.set(title="Accuracy with and without pruning", xlabel="epoch")
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, top - 2))  # at least two points, so that a tenth is not a cliff
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)  # below: the curves may run anywhere


def draw_schedule(axes: Axes, pruned: dict[str, Any], update_epochs: list[float]) -> None:
    last_epoch = pruned["history"][-1]["epoch"]
    planned, actual = ([100 * update[kind] for update in pruned["mask_updates"]] for kind in ("planned", "actual"))
    epochs = [0, update_epochs[0], *update_epochs, last_epoch]
    axes.plot(epochs, [0, 0, *planned, planned[-1]], color="#009E73", label="planned")
    axes.plot(update_epochs, actual, ".", color=PRUNED["color"], label="actual, after each mask update")
    axes.set(title="Sparsity, planned and actual", xlabel="epoch", ylabel="sparsity (% of weights)")
    axes.set_ylim(0, 1.1 * max(planned[-1], 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right")


def draw_layers(axes: Axes, layers: list[dict[str, Any]]) -> None:
    names = [layer["layer"].removesuffix(".weight") for layer in layers]
    sparsity = [100 * (1 - layer["nonzero"] / layer["weights"]) for layer in layers]
    axes.barh(names, sparsity, color=PRUNED["color"])
    for place, (layer, width) in enumerate(zip(layers, sparsity, strict=True)):
        inside = width > 55
        style = {"color": "white", "ha": "right"} if inside else {"ha": "left"}
        label = f"{layer['nonzero']:,} of {layer['weights']:,} left"
        axes.text(width - 1.5 if inside else width + 1.5, place, label, va="center", **style)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="Sparsity of each layer", xlabel="sparsity (% of the layer's weights)", xlim=(0, 100))


def draw_weights(axes: Axes, dense: dict[str, Any], pruned: dict[str, Any]) -> None:
    axes.stairs(pruned["counts"], pruned["edges"], fill=True, color=PRUNED["color"], alpha=0.6, label="pruned")
    axes.stairs(dense["counts"], dense["edges"], color=DENSE["color"], linewidth=1.8, label="dense")
    axes.set(
        title="Nonzero weights by magnitude",
        xlabel="|weight|",
        ylabel="nonzero weights per bin",
        xscale="log",
        xlim=(1e-5, 2),
    )
    if 20 * max(pruned["counts"]) < max(dense["counts"]):  # few are left, and would lie flat on the axis
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left")


def draw_fine_tuning(axes: Axes, run: dict[str, Any]) -> None:
    before, after = run["dense"]["history"], run["pruned"]["history"]
    longer = run.get("longer", {}).get("history", [])
    epochs = len(before)
    curves = ((before, DENSE, 0), (longer, LONGER, epochs), (after, PRUNED, epochs))
    for history, style, first in (curve for curve in curves if curve[0]):
        places = [first + epoch["epoch"] for epoch in history]
        axes.plot(places, [epoch["test_accuracy"] for epoch in history], **style)
    ends = [run["dense"]["test_accuracy"], *(history[-1]["test_accuracy"] for history, _, _ in curves if history)]
    if "scratch" in run:  # its epochs are many more
        ends.append(run["scratch"]["test_accuracy"])
        color, linestyle = (CONTROLS["scratch"][key] for key in ("color", "linestyle"))
        label = f"from scratch, {len(run['scratch']['history'])} epochs"
        axes.axhline(ends[-1], color=color, linestyle=linestyle, label=label)
    bottom, top = min(ends) - 7, max(ends) + 1  # so that half a point can be seen
    pruned = run["before_fine_tuning"]["test_accuracy"]
    label = f"not fine-tuned: {pruned:.1f} %"
    shown, marker = (pruned, "x") if pruned >= bottom else (bottom + 0.3, "v")
    axes.plot(epochs, shown, marker, color="black", markersize=9, markeredgewidth=2, label=label)
    axes.set(title="Training, pruning, fine-tuning", xlabel="epoch", ylim=(bottom, top))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)  # below: the curves may run anywhere


def draw_filters(axes: Axes, layers: list[dict[str, Any]]) -> None:
    names, kept = [layer["layer"] for layer in layers], [layer["kept"] for layer in layers]
    removed = [layer["filters"] - layer["kept"] for layer in layers]
    axes.barh(names, kept, color=DENSE["color"], label="kept")
    bars = axes.barh(names, removed, left=kept, color=PRUNED["color"], hatch="//", edgecolor="white", label="removed")
    axes.bar_label(bars, [f"{layer['kept']} of {layer['filters']} kept" for layer in layers], padding=4)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="Filters of each layer", xlabel="filters")
    axes.set_xlim(right=1.55 * max(layer["filters"] for layer in layers))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def draw_scores(axes: Axes, run: dict[str, Any], threshold_mode: str) -> None:
    for index, layer in enumerate(run["layers"]):
        values = in_units(np.sort(layer["scores"])[::-1], threshold_mode)
        rank = 100 * np.arange(1, layer["filters"] + 1) / layer["filters"]
        axes.plot(rank, values, **LAYERS[index % len(LAYERS)], label=layer["layer"])
        last = layer["kept"] - 1
        axes.plot(rank[last], values[last], "o", color=LAYERS[index % len(LAYERS)]["color"])
    if threshold_mode != "quantile":
        axes.axhline(run["threshold"], color="black", linewidth=1)
        axes.annotate(f"cutoff {run['threshold']:.3g}", (0, run["threshold"]), (4, -14), textcoords="offset points")
    unit = {"standardized": ", standardized", "relative": " / the layer's highest"}.get(threshold_mode, "")
    axes.set(
        title="Importance of each layer's filters (dots: the last one kept)",
        xlabel="filters, most important first (% of the layer)",
        ylabel=f"{look(run['method'])['label']}{unit}",
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def in_units(scores: np.ndarray, threshold_mode: str) -> np.ndarray:
    """The scores of a layer in the unit of the cutoff."""
    if threshold_mode == "standardized":
        return 1 + (scores - scores.mean()) / (scores.std() or 1)
    return scores / (scores.max() or 1) if threshold_mode == "relative" else scores


def draw_costs(axes: Axes, dense: dict[str, Any], pruned: dict[str, Any]) -> None:
    costs = {
        "parameters": [(record["parameters"], f"{record['parameters']:,}") for record in (dense, pruned)],
        "MACs": [(record["macs"], f"{record['macs'] / 1e6:.1f} M") for record in (dense, pruned)],
        **{
            f"latency,\n{batch}": [
                (record["latency_ms"][batch], f"{record['latency_ms'][batch]:.3g} ms") for record in (dense, pruned)
            ]
            for batch in dense["latency_ms"]
        },
        "accuracy": [(record["test_accuracy"], f"{record['test_accuracy']:.2f} %") for record in (dense, pruned)],
    }
    for place, style in enumerate((DENSE, PRUNED)):
        bars = axes.barh(
            [index + 0.38 * (place - 0.5) for index in range(len(costs))],
            [100 * cost[place][0] / cost[0][0] for cost in costs.values()],
            height=0.36,
            color=style["color"],
            label=style["label"],
        )
        axes.bar_label(bars, [cost[place][1] for cost in costs.values()], padding=4)
    axes.set_yticks(range(len(costs)), costs)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="Cost and accuracy before and after pruning", xlabel="% of the dense network", xlim=(0, 135))
    axes.set_xticks(range(0, 101, 20))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def png(figure: Figure) -> bytes:
    """The figure's PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
