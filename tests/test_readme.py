"""The README's tables say what the committed JSON says."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from experiment.results import mean_and_std, with_std
from pruning.filters import filters_to_keep
from structured_pruning import parameters_with, speed_up

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROSE = " ".join(README.split())


def report(path):
    return json.loads((ROOT / path).read_text())


def row(*cells):
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells) + "\n"


def mnist_rows():
    sweep = report("results/unstructured_mnist_sweep.json")
    yield row("dense", "430,500", with_std(sweep["summary"]["dense"]), "", "", "", "431,080", "1")
    points = {(point["method"], point["sparsity_target"]): point for point in sweep["summary"]["pruned"]}
    for sparsity in sweep["arguments"]["sparsity_target"]:
        point, *by_chance = (points[method, sparsity] for method in ("magnitude", "shuffled", "random"))
        yield row(
            f"{100 * sparsity:g} %",
            f"{point['nonzero_weights']['mean']:,.0f}",
            with_std(point["test_accuracy"]),
            with_std(point["drop"]),
            *(with_std(other["test_accuracy"]) for other in by_chance),
            f"{point['compacted_parameters']['mean']:,.0f}",
            with_std(point["compacted_speed_up"]),
        )


def record_rows():
    for run in report("results/record/unstructured_mnist_sweep.json")["runs"]:
        accuracies = (f"{run[network]['test_accuracy']:.2f}" for network in ("pruned", "dense"))
        yield row(f"seed {run['seed']}", f"{run['pruned']['nonzero_weights']:,}", *accuracies)


def cifar_rows():
    sweep = report("results/structured_cifar_sweep.json")
    points = sweep["summary"]["pruned"]
    size = f"{sweep['runs'][0]['dense']['parameters']:,}"
    yield row("dense", size, "", with_std(sweep["summary"]["dense"]), "", "", "1", "1", "1")
    yield row("dense, trained on as long", size, "", with_std(points[0]["longer_accuracy"]), "", "", "", "", "")
    by_chance = {point["target_params"]: point for point in points if point["method"] == "shuffled"}
    for point in points:
        if point["method"] == "l2":
            target = point["target_params"]
            yield cifar_row(f"{target:,} asked for", point, by_chance[target])
    yield cifar_row("62 % of each layer", *report("results/uniform/structured_cifar_sweep.json")["summary"]["pruned"])


def cifar_row(name, point, by_chance):
    return row(
        name,
        f"{point['parameters']['mean']:,.0f}",
        with_std(point["cut_accuracy"]),
        with_std(point["test_accuracy"]),
        with_std(point["drop"]),
        with_std(by_chance["test_accuracy"]),
        with_std(point["macs_reduction"]),
        with_std(point["speed_up_1"]),
        with_std(point["speed_up_256"]),
    )


def bench_rows():
    throughput = report("benchmarks/results/throughput.json")
    for kind, rate in throughput["gflops"].items():
        yield row(kind, f"{rate:.0f}", f"{100 * throughput['of_float32_matrix_product'][kind]:.0f} %")
    cost = report("benchmarks/results/epoch_cost.json")
    for kind in cost["seconds"]:
        ratio, spread = cost["median_ratio_to_dense"][kind], with_std(cost["ratio_to_dense"][kind])
        yield f"| {cost['median'][kind]:.2f} | {ratio:.3f} | {spread} |\n"
    growth = report("benchmarks/results/growth.json")
    for update in growth["mask_update"]:
        seconds = [statistics.median(update[kind]) for kind in ("ours", "torch.nn.utils.prune")]
        yield row(f"{update['weights']:,}", *(f"{each:.3f}" for each in seconds))
    for surgery in growth["surgery"]:
        yield row(surgery["network"], str(surgery["layers"]), f"{statistics.median(surgery['seconds']):.2f}")
    filters = report("benchmarks/results/filters.json")
    for cut in filters["cuts"]:
        pruned = cut["pruned"]
        yield row(
            f"{cut['kind']}, {cut['target_params']:,} asked for",
            f"{pruned['parameters']:,}",
            *(f"{cut[network]['test_accuracy']:.2f}" for network in ("cut", "pruned")),
            f"{cut['dense']['macs'] / pruned['macs']:.2f}",
            *(f"{speed_up(cut, batch):.2f}" for batch in ("batch 1", "batch 256")),
            f"{cut['from_masked']:.0e}",
        )
    for network, surgery in filters["surgery"].items():
        yield row(network, *(f"{statistics.median(by['seconds']):.2f}" for by in surgery["by"].values()))
    for point in report("benchmarks/results/weights.json")["summary"]:
        accuracies = (with_std(accuracy) for accuracy in point["test_accuracy"].values())
        yield row(f"{100 * point['sparsity_target']:g} %", *accuracies, with_std(point["seconds_ratio"]))


@pytest.mark.parametrize("expected", [*mnist_rows(), *record_rows(), *cifar_rows(), *bench_rows()])
def test_every_row_of_the_tables_is_that_of_the_json(expected):
    assert expected in README


def test_what_the_text_says_of_single_runs():
    mnist, cifar = report("results/unstructured_mnist.json"), report("results/structured_cifar.json")
    dense, pruned = (mnist[network]["test_accuracy"] for network in ("dense", "pruned"))
    assert f"{dense:.2f} % dense, {pruned:.2f} % with exactly" in PROSE
    record = report("results/record/unstructured_mnist_sweep.json")["summary"]["pruned"][0]
    assert f"At the far end 1,500 weights, one in 287, reach {with_std(record['test_accuracy'])} %" in PROSE
    assert f"which is {with_std(record['drop'])} points below the dense network" in PROSE
    assert f"1,500 of them are enough for {record['test_accuracy']['mean']:.2f} %," in PROSE
    dense, cut, pruned = (cifar[network]["test_accuracy"] for network in ("dense", "cut", "pruned"))
    told = f"{dense:.2f} % dense, {cut:.2f} % right after the cut, {pruned:.2f} % fine-tuned"
    assert told in PROSE
    assert f"{cifar['pruned']['parameters']:,}" in README
    assert f"{speed_up(cifar, 'batch 256'):.2f} times as fast" in PROSE


def test_what_the_text_says_of_the_filters_sweep():
    sweep = report("results/structured_cifar_sweep.json")
    points = {(point["method"], point["target_params"]): point for point in sweep["summary"]["pruned"]}
    half, third = (points["l2", target] for target in (380_528, 230_000))
    accuracy, dense = half["test_accuracy"]["mean"], sweep["summary"]["dense"]["mean"]
    assert f"{accuracy:.2f} % instead of {dense:.2f} % after fine-tuning" in PROSE
    assert f"70 % of them cost {third['drop']['mean']:.2f} points." in PROSE
    assert f"The whole network, trained on as long, reaches {half['longer_accuracy']['mean']:.2f} %." in PROSE
    runs = {}
    for run in sweep["runs"]:
        runs.setdefault((run["method"], run["target_params"]), []).append(run)

    def ahead(accuracies, others):
        return with_std(mean_and_std([one - other for one, other in zip(accuracies, others, strict=True)]))

    def accuracies(method, target, network="pruned"):
        return [run[network]["test_accuracy"] for run in runs[method, target]]

    longer = ahead(accuracies("l2", 380_528, "longer"), accuracies("l2", 380_528))
    assert f"Half the parameters are {longer} points below the dense network" in PROSE
    half, third = (ahead(accuracies("l2", target), accuracies("shuffled", target)) for target in (380_528, 230_000))
    assert f"cost {half} points more than by the norm at half, {third} at 230,000" in PROSE
    narrowest = [min(run["pruned"]["widths"]) for run in runs["l2", 120_000]]
    assert "the narrowest layer {}, {} and {} filters".format(*narrowest) in PROSE
    assert "end at {:.2f}, {:.2f} and {:.2f} %".format(*accuracies("l2", 120_000)) in PROSE
    uniform = report("results/uniform/structured_cifar_sweep.json")["summary"]["pruned"]
    by_norm, at_random = (with_std(point["test_accuracy"]) for point in uniform)
    assert f"reach {by_norm} % by the norm and {at_random} % at random" in PROSE


def test_what_the_text_says_of_each_layer_alone():
    sensitivity = report("results/structured_cifar_sensitivity.json")
    assert f"Each layer of a network of {sensitivity['test_accuracy']:.2f} % cut alone" in PROSE
    at_half = {}
    for layer in sensitivity["layers"]:
        (at_half[layer["layer"]],) = (point for point in layer["points"] if point["threshold"] == 0.5)
        at_half[layer["layer"]]["filters"] = layer["filters"]
    last = at_half["conv6"]
    lost = sensitivity["test_accuracy"] - last["test_accuracy"]
    assert f"{last['filters'] - last['kept']} of its {last['filters']} filters for {lost:.2f} points" in PROSE
    assert all(at_half[layer]["kept"] == at_half[layer]["filters"] for layer in ("conv1", "conv2", "conv3"))


def test_half_of_the_highest_score_leaves_about_half_of_the_parameters_on_every_seed():
    """The scores are in the reports; which filters stay at the default threshold follows from them."""
    left = {}
    runs = report("results/structured_cifar_sweep.json")["runs"]
    for run in (run for run in runs if run["method"] == "l2"):
        scores = {layer["layer"]: torch.tensor(layer["scores"]) for layer in run["layers"]}
        left[run["seed"]] = parameters_with(filters_to_keep(scores, 0.5))
    assert left[0] == report("results/structured_cifar.json")["pruned"]["parameters"]
    for run in report("results/cut_only/structured_cifar_sweep.json")["runs"]:
        left[run["seed"]] = run["pruned"]["parameters"]
    assert sorted(left) == [0, 1, 2, 3, 4]
    assert all(350_000 <= parameters <= 390_000 for parameters in left.values()), left
    told = f"leaves {min(left.values()):,} to {max(left.values()):,} parameters on seeds 0 to 4"
    assert told in PROSE
