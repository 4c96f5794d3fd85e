"""The tables and the text of the READMEs say what the committed JSON says."""

import itertools
import json
import re
import statistics
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from experiment import report
from experiment.report import speed_up, with_std
from models.cifar_cnn import CifarCNN

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "results/reference"
README, RESULTS, BENCHMARKS = ((ROOT / folder / "README.md").read_text() for folder in ("", "results", "benchmarks"))


def prose(text):
    return " ".join(text.split())


def row(*cells):
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells) + "\n"


def points(path, *keys):
    sweep = report.load(REFERENCE / path)
    return sweep, {tuple(point[key] for key in keys): point for point in sweep["summary"]["pruned"]}


def bench(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def mnist_rows():
    sweep, found = points("unstructured_mnist_sweep.json", "method", "sparsity_target")
    dense = with_std(sweep["summary"]["dense"])
    yield RESULTS, row("dense", "430,500", dense, "", "", "", "431,080", "1")
    yield README, row("dense, 10 epochs", "430,500", dense, "", "")
    for sparsity in sweep["arguments"]["sparsity_target"]:
        point, *by_chance = (found[method, sparsity] for method in ("magnitude", "layerwise_random", "random"))
        cells = [f"{point['nonzero_weights']['mean']:,.0f}"]
        cells += [with_std(each) for each in (point["test_accuracy"], point["drop"], by_chance[0]["test_accuracy"])]
        rest = [with_std(by_chance[1]["test_accuracy"]), f"{point['compacted_parameters']['mean']:,.0f}"]
        yield RESULTS, row(f"{100 * sparsity:g} %", *cells, *rest, with_std(point["compacted_speed_up"]))
        if sparsity in (0.5, 0.9, 0.99):
            yield README, row(f"{100 * sparsity:g} %" + " sparsity" * (sparsity == 0.5), *cells)


def control_rows():
    sweep, found = points("controls/unstructured_mnist_sweep.json", "sparsity_target")
    yield RESULTS, row("dense", "430,500", with_std(sweep["summary"]["dense"]), "", "", "", "")
    for (sparsity,), point in found.items():
        cells = [f"{point['nonzero_weights']['mean']:,.0f}", with_std(point["test_accuracy"])]
        for control in ("ticket", "scratch"):
            runs = [run for run in sweep["runs"] if run["sparsity_target"] == sparsity]
            cells.append(with_std(point[f"{control}_accuracy"]))
            cells.append(spread(run["pruned"]["test_accuracy"] - run[control]["test_accuracy"] for run in runs))
        yield RESULTS, row(f"{100 * sparsity:g} %", *cells)
    _, by_chance = points("unstructured_mnist_sweep.json", "method", "sparsity_target")
    reach = [by_chance["layerwise_random", sparsity]["test_accuracy"]["mean"] for sparsity in (0.99, 0.995)]
    yield prose(RESULTS), "better than layer-wise random ones ({:.2f} and {:.2f} %, first table".format(*reach)
    last = found[(0.99,)]
    told = [with_std(last[f"{name}_accuracy"]) for name in ("ticket", "scratch")]
    yield prose(README), "reach {} %; on other initial weights {} %".format(*told)


def scope_rows():
    sweep, found = points("scopes/unstructured_mnist_sweep.json", "scope", "sparsity_target")
    yield RESULTS, row("dense", "430,500", with_std(sweep["summary"]["dense"]), "")
    for (scope, _), point in found.items():
        accuracy, drop = with_std(point["test_accuracy"]), with_std(point["drop"])
        yield RESULTS, row(f"`--scope {scope}`", f"{point['nonzero_weights']['mean']:,.0f}", accuracy, drop)


def by_seed(sweep, point):
    """The accuracies of the runs that a point of the summary is about."""
    runs = [run for run in sweep["runs"] if all(run[key] == point[key] for key in ("method", "scope"))]
    runs = [run for run in runs if run["sparsity_target"] == point["sparsity_target"]]
    return ", ".join(f"{run['pruned']['test_accuracy']:.2f}" for run in runs)


def ablation_rows():
    far, ablation, saliency = (
        report.load(REFERENCE / f"{name}/unstructured_mnist_sweep.json") for name in ("far_end", "ablation", "saliency")
    )
    every = [(sweep, point) for sweep in (far, ablation, saliency) for point in sweep["summary"]["pruned"]]
    every = [(sweep, point) for sweep, point in every if point["sparsity_target"] == 0.996516]
    names = (
        "saliency, `--method obd`, above",
        "magnitude",
        "magnitude, `--scope lamp`",
        "saliency, the default recipe",
    )
    for name, (sweep, point) in zip(names, every, strict=True):
        yield RESULTS, row(name, by_seed(sweep, point), with_std(point["test_accuracy"]), with_std(point["drop"]))
    magnitude = with_std(ablation["summary"]["pruned"][0]["test_accuracy"])
    yield prose(README), f"The same training ranked by magnitude reaches {magnitude} %"


def ranking_rows():
    for name in ("rankings", "saliency"):
        sweep, found = points(f"{name}/unstructured_mnist_sweep.json", "method", "scope", "sparsity_target")
        for method, scope in itertools.product(sweep["arguments"]["method"], sweep["arguments"]["scope"]):
            two = [found[method, scope, sparsity] for sparsity in (0.98, 0.995)]
            cells = [with_std(point[quantity]) for point in two for quantity in ("test_accuracy", "drop")]
            yield RESULTS, row(f"`--method {method} --scope {scope}`", *cells)
        yield RESULTS, f"the dense networks reach {with_std(sweep['summary']['dense'])} %"
    starved = report.load(REFERENCE / "rankings/unstructured_mnist_sweep.json")["summary"]["pruned"]
    (left,) = [point for point in starved if (point["scope"], point["sparsity_target"]) == ("layer", 0.995)]
    yield prose(RESULTS), f"580 biases compaction leaves {left['compacted_nonzero']['mean']:,.0f}."
    _, found = points("unstructured_mnist_sweep.json", "method", "sparsity_target")
    reach = {method: found[method, 0.995]["test_accuracy"]["mean"] for method in ("random", "layerwise_random")}
    yield prose(RESULTS), "reach {random:.2f} %, with magnitude's counts {layerwise_random:.2f} %;".format(**reach)
    magnitude = found["magnitude", 0.995]["test_accuracy"]["mean"]
    alike = f"reach {left['test_accuracy']['mean']:.2f} % (`--scope layer`, below)"
    yield prose(RESULTS), f"{alike}, with magnitude's counts {magnitude:.2f} %"


def rows_by_weights(sweep, found):
    dense = {run["seed"]: f"{run['dense']['test_accuracy']:.2f}" for run in sweep["runs"]}
    yield RESULTS, row("430,500", ", ".join(dense.values()), with_std(sweep["summary"]["dense"]), "", "431,080")
    for point in found.values():
        cells = [f"{point['nonzero_weights']['mean']:,.0f}", by_seed(sweep, point), with_std(point["test_accuracy"])]
        yield RESULTS, row(*cells, with_std(point["drop"]), f"{point['compacted_nonzero']['mean']:,.0f}")


def far_rows():
    yield from rows_by_weights(*points("longer/unstructured_mnist_sweep.json", "sparsity_target"))
    sweep, found = points("far_end/unstructured_mnist_sweep.json", "sparsity_target")
    yield from rows_by_weights(sweep, found)
    missed = {}
    for point in found.values():
        weights = round(point["nonzero_weights"]["mean"])
        accuracy, drop = with_std(point["test_accuracy"]), with_std(point["drop"])
        if weights == 1_500:
            yield README, row("99.65 % by saliency, 60 epochs", "1,500", accuracy, drop, "")
        if weights >= 1_000:
            error = with_std({**point["test_accuracy"], "mean": 100 - point["test_accuracy"]["mean"]})
            yield RESULTS, row(f"**{weights:,} weights, above**", f"{430_500 / weights:.0f}", f"{weights:,}", error)
        if goal := {1_390: 99.25, 1_000: 99.1}.get(weights):
            missed[weights] = goal - point["test_accuracy"]["mean"]
    yield prose(RESULTS), "are missed by {:.2f} and {:.2f} points".format(*missed.values())
    record = report.load(REFERENCE / "record/unstructured_mnist_sweep.json")
    (point,) = record["summary"]["pruned"]
    told = f"`reference/record`, reached {with_std(point['test_accuracy'])} % ({by_seed(record, point)})"
    yield prose(RESULTS), told


def spread(values):
    return with_std(report.mean_and_std(list(values)))


def accuracies(sweep, method, target):
    """Of the pruned networks of CIFAR-10, in the order of the seeds."""
    runs = [run for run in sweep["runs"] if (run["method"], run["target_params"]) == (method, target)]
    return [run["pruned"]["test_accuracy"] for run in runs]


def cifar_rows():
    sweep, found = points("structured_cifar_sweep.json", "method", "target_params")
    longer, dense = with_std(found["l2", 380_528]["longer_accuracy"]), with_std(sweep["summary"]["dense"])
    yield RESULTS, row("dense, 12 + 5 epochs", "", longer, "", "", "1", "1", "1")
    yield RESULTS, row("dense, 12 epochs", "", dense, "", "", "1", "1", "1")
    yield README, row("767,936, dense, 12 + 5 epochs", longer, "", "", "1", "1")
    for target in sweep["arguments"]["target_params"]:
        point, by_chance = found["l2", target], with_std(found["layerwise_random", target]["test_accuracy"])
        quantities = ("accuracy_before", "test_accuracy", "drop", "macs_reduction")
        before, accuracy, drop, *cheaper = (with_std(point[quantity]) for quantity in quantities)
        alike = [run for run in sweep["runs"] if run["target_params"] == target]  # both methods leave the same shape
        for batch in ("batch 1", "batch 256"):
            cheaper.append(spread(speed_up(run["dense"], run["pruned"], batch) for run in alike))
        size = f"{point['parameters']['mean']:,.0f}"
        yield RESULTS, row(size, before, accuracy, drop, by_chance, *cheaper)
        yield README, row(size, accuracy, drop, by_chance, cheaper[0], cheaper[2])
        by_seed = (
            ", ".join(f"{accuracy:.2f}" for accuracy in accuracies(sweep, method, target))
            for method in ("l2", "layerwise_random")
        )
        yield RESULTS, row(size, *by_seed)


def method_rows():
    _, found = points("methods/structured_cifar_sweep.json", "method")
    yield RESULTS, row("dense, 12 + 5 epochs", "", with_std(found[("l2",)]["longer_accuracy"]), "", "1")
    for (method,), point in found.items():
        quantities = ("accuracy_before", "test_accuracy", "drop", "macs_reduction")
        yield RESULTS, row(f"`{method}`", *(with_std(point[quantity]) for quantity in quantities))


def nine_epochs_rows():
    five, found = points("methods/structured_cifar_sweep.json", "method")
    nine, longer_found = points("nine_epochs/structured_cifar_sweep.json", "method")
    dense = [run["longer"]["test_accuracy"] for run in five["runs"] if run["method"] == "l2"]
    for sweep, accuracy in ((five, found), (nine, longer_found)):
        runs = [run for run in sweep["runs"] if run["method"] == "l2"]
        reached = [run["pruned"]["test_accuracy"] for run in runs]
        cells = ", ".join(f"{each:.2f}" for each in reached), with_std(accuracy[("l2",)]["test_accuracy"])
        below = spread(whole - part for whole, part in zip(dense, reached, strict=True))
        epochs = sweep["arguments"]["fine_tune_epochs"]
        cost = f"{statistics.mean(epochs * run['pruned']['macs'] / (5 * run['dense']['macs']) for run in runs):.2f}"
        yield RESULTS, row(f"{epochs} epochs", cost, *cells, below)
    yield prose(README), f"fine-tuned for nine epochs, the same FLOPs, {below}"
    yield prose(RESULTS), f"after nine, which cost more, pruning comes near to it ({cells[1][:5]} %"
    assert [run["dense"]["test_accuracy"] for run in nine["runs"]] == [
        run["dense"]["test_accuracy"] for run in five["runs"] if run["method"] == "l2"
    ], "the same dense networks"


def scratch_rows():
    sweep, found = points("scratch/structured_cifar_sweep.json", "target_params")
    by_target, told = {}, []
    for run in sweep["runs"]:
        by_target.setdefault(run["target_params"], []).append(run)
    yield RESULTS, row("dense, 12 epochs", "", with_std(sweep["summary"]["dense"]), "", "", "")
    for target, runs in by_target.items():
        fine_tuned, scratch = ([run[kind]["test_accuracy"] for run in runs] for kind in ("pruned", "scratch"))
        better = [anew - kept for anew, kept in zip(scratch, fine_tuned, strict=True)]
        assert min(better) > 0, "on every seed"
        point = found[(target,)]
        cells = f"{point['parameters']['mean']:,.0f}", epochs(runs), with_std(point["test_accuracy"])
        by_seed = ", ".join(f"{accuracy:.2f}" for accuracy in scratch)
        yield RESULTS, row(*cells, by_seed, with_std(point["scratch_accuracy"]), spread(better))
        told.append((with_std(point["scratch_accuracy"]), spread(better), epochs(runs)))
    as_good = found[(380_528,)]["scratch_accuracy"]
    assert abs(as_good["mean"] - sweep["summary"]["dense"]["mean"]) < as_good["std"], "half of the parameters as all"
    (half, by_half, long), (sixth, by_sixth, longer) = told
    yield prose(README), f"for the FLOPs of all that, {long} and {longer} epochs, is better"
    yield prose(RESULTS), f"trained from scratch for {long} epochs"
    yield prose(README), f"{half} % at half of the parameters and {sixth} % at a sixth, {by_half} and {by_sixth} points"
    yield prose(RESULTS), f"by {by_half} points at half of the parameters, by {by_sixth} at a sixth"


def epochs(runs):
    """How long the networks were trained from scratch."""
    lengths = sorted({len(run["scratch"]["history"]) for run in runs})
    return f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"


def filter_rows():
    for point in bench("filters")["summary"]["pruned"]:
        quantities = ("macs_reduction", "accuracy_before", "test_accuracy", "speed_up_256")
        cells = (with_std(point[quantity]) for quantity in quantities)
        yield BENCHMARKS, row(point["by"], f"{point['parameters']['mean']:,.0f}", *cells)


def bench_rows():
    throughput = bench("throughput")
    for kind, rate in throughput["gflops"].items():
        yield BENCHMARKS, row(kind, f"{rate:.0f}", f"{100 * throughput['of_float32_matrix_product'][kind]:.0f} %")
    cost = bench("epoch_cost")
    for kind in cost["seconds"]:
        ratio, spread = cost["median_ratio_to_dense"][kind], with_std(cost["ratio_to_dense"][kind])
        yield BENCHMARKS, f"| {cost['median'][kind]:.2f} | {ratio:.3f} | {spread} |\n"
    for update in bench("growth")["mask_update"]:
        seconds = [statistics.median(update[kind]) for kind in ("ours", "layer", "lamp", "obd", "torch.nn.utils.prune")]
        cells = [f"{each:.3f}" for each in seconds]
        yield BENCHMARKS, row(f"{update['weights']:,}", *cells, f"{seconds[-1] / seconds[0]:.1f}")
    for surgery in bench("growth")["surgery"]:
        seconds = statistics.median(surgery["seconds"])
        yield BENCHMARKS, row(surgery["network"], str(surgery["layers"]), f"{seconds:.2f}")
    for line in bench("sparse_products")["rows"]:
        for batch in ("batch 1", "batch 256"):
            times = (f"{by_batch[batch]:.2f}" for by_batch in line["speed_up"].values())
            yield BENCHMARKS, row(f"{100 * line['sparsity_target']:.4g} %, {batch}", *times)
    for name, line in bench("networks")["rows"].items():
        yield BENCHMARKS, row(name, *network_cells(line))
    for way in bench("held_out")["ways"]:
        measured = f"{way['held_out_accuracy']:.2f}", f"{way['held_out_loss']:.4f}"
        yield BENCHMARKS, row(f"{way['learning_rate']}", f"{way['teacher_weight']}", *measured)
    for point in bench("weights")["summary"]:
        accuracies = (with_std(accuracy) for accuracy in point["test_accuracy"].values())
        yield BENCHMARKS, row(f"{100 * point['sparsity_target']:g} %", *accuracies, with_std(point["seconds_ratio"]))


def network_cells(line):
    """Of ours and of torch-pruning: parameters left, seconds, MiB, difference from masking, whether it trains."""
    for kind in ("ours", "torch-pruning"):
        cut = {**line["seconds"].get(kind, {}), **line[kind]}
        seconds = statistics.median(cut["seconds"]) if cut.get("seconds") else None
        forms = ((cut.get("parameters_left"), ".3f"), (seconds, ".2f"), (cut.get("peak_mib"), ".0f"))
        yield from ("–" if value is None else format(value, form) for value, form in forms)
        difference = cut.get("difference")
        exact = "–" if difference is None else f"{difference:.0e}"
        yield exact if cut.get("trains") or difference is None else f"{exact}, does not train"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *mnist_rows(),
        *control_rows(),
        *scope_rows(),
        *ablation_rows(),
        *ranking_rows(),
        *far_rows(),
        *cifar_rows(),
        *method_rows(),
        *nine_epochs_rows(),
        *scratch_rows(),
        *filter_rows(),
        *bench_rows(),
    ],
    ids=lambda value: value[:60] if value.startswith("|") else "",
)
def test_every_row_of_the_tables_is_that_of_the_json(text, expected):
    assert expected in text


def test_the_readme_is_short_and_what_it_prints_is_what_the_script_prints():
    assert len(README.splitlines()) <= 120
    mnist = report.load(REFERENCE / "unstructured_mnist.json")
    (run,) = mnist["runs"]
    printed = [f"{run['pruned']['test_accuracy']:.2f}", f"{run['drop']:.2f}"]
    printed += [f"{run['compacted']['nonzero_parameters']:,}", f"{run['compacted']['parameters']:,}"]
    printed = ["magnitude,", "50", "%", f"{run['pruned']['nonzero_weights']:,}", *printed]
    printed.append(f"{speed_up(run['dense'], run['compacted'], 'batch 256'):.2f}")
    lines = [line.split() for line in README.splitlines()]
    assert printed in lines
    assert ["dense", f"{run['dense']['test_accuracy']:.2f}"] in lines


def test_how_long_the_default_runs_take():
    for name, epochs, seconds, told in (
        ("unstructured_mnist", 20, 4, "20 epochs of 4 seconds on two CPU cores"),
        ("structured_cifar", 22, 30, "22 epochs of half a minute with bfloat16"),
    ):
        default = report.load(REFERENCE / f"{name}.json")
        (run,) = default["runs"]
        trained = [run[part] for part in ("dense", "pruned", "longer") if part in run]
        taken = [epoch["seconds"] for each in trained for epoch in each["history"]]
        assert len(taken) == epochs
        assert max(taken) < seconds
        assert default["environment"]["threads"] == 2
        assert told in README


def test_what_the_text_says_of_mnist():
    (run,) = report.load(REFERENCE / "unstructured_mnist.json")["runs"]
    dense, pruned = run["dense"], run["pruned"]
    told = f"{dense['test_accuracy']:.2f} % dense, {pruned['test_accuracy']:.2f} % with exactly 215,250 weights at zero"
    assert told in prose(RESULTS)
    assert f"{pruned['checkpoint_bytes']:,} bytes instead of {dense['checkpoint_bytes']:,}" in prose(RESULTS)


def test_what_the_text_says_of_few_weights():
    (run,) = report.load(REFERENCE / "few/unstructured_mnist.json")["runs"]
    told = f"reaches {run['pruned']['test_accuracy']:.2f} % with 1,500 weights (seed 0), {run['drop']:.2f} points below"
    assert run["pruned"]["nonzero_weights"] == 1500
    assert told in prose(RESULTS)
    assert f"After compaction {run['compacted']['nonzero_parameters']:,} numbers" in prose(RESULTS)
    again = report.load(REFERENCE / "saliency/unstructured_mnist_sweep.json")["runs"]
    (twin,) = [each for each in again if (each["seed"], each["sparsity_target"]) == (0, 0.996516)]
    assert f"the same seed reaches {twin['pruned']['test_accuracy']:.2f} %" in prose(RESULTS)


def test_what_the_text_says_of_cifar():
    sweep, found = points("structured_cifar_sweep.json", "method", "target_params")
    assert f"Half of the parameters cost {with_std(found['l2', 380_528]['drop'])} points" in prose(README)
    apart = []
    for target in sweep["arguments"]["target_params"]:
        pairs = zip(*(accuracies(sweep, method, target) for method in ("l2", "layerwise_random")), strict=True)
        differences = [norm - chance for norm, chance in pairs]
        apart.append(spread(differences))
        assert (min(differences) > 0) == (target == 60_000), "only the last on every seed"
        difference = report.mean_and_std(differences)
        exceeds = difference["mean"] > 2 * difference["std"]
        assert exceeds == (target == 60_000), "only the last is more than the seeds differ"
    assert "better than layer-wise random by {}, {}, {} and {} points".format(*apart) in prose(README)
    every, _ = points("methods/structured_cifar_sweep.json", "method")
    by_chance = accuracies(every, "layerwise_random", 380_528)
    for method in ("l2", "l1", "fpgm", "taylor", "bn_scale", "random"):
        better = zip(accuracies(every, method, 380_528), by_chance, strict=True)
        told = spread(accuracy - chance for accuracy, chance in better)
        assert f"`{method}` by {told}" in prose(RESULTS)
    behind = zip(accuracies(every, "l2", 380_528), accuracies(every, "bn_scale", 380_528), strict=True)
    told = spread(norm - scale for norm, scale in behind)
    assert f"Only `bn_scale` is behind `l2` on every seed by more than the seeds differ, {told}" in prose(RESULTS)
    _, one_shot = points("one_shot/structured_cifar_sweep.json", "method")
    before = {method: point["accuracy_before"] for (method,), point in one_shot.items()}
    told = with_std(before.pop("taylor")), with_std(before.pop("random"))
    assert "`taylor` has {} %, `random` {} %, the others 42 to 44 %".format(*told) in prose(RESULTS)
    assert {round(accuracy["mean"]) for accuracy in before.values()} == {42, 44}
    apart = []
    for run, twin in itertools.combinations(sweep["runs"], 2):  # l2 and layerwise_random leave the same shape
        if run["pruned"]["widths"] == twin["pruned"]["widths"]:
            for batch in ("batch 1", "batch 256"):
                times = [speed_up(each["dense"], each["pruned"], batch) for each in (run, twin)]
                apart.append(100 * (max(times) / min(times) - 1))
    assert f"the same shape differ by up to {max(apart):.0f} %" in prose(RESULTS)
    (default,) = report.load(REFERENCE / "structured_cifar.json")["runs"]
    left, macs = default["pruned"], default["dense"]["macs"] / default["pruned"]["macs"]
    assert f"{left['parameters']:,} parameters, {macs:.2f} times fewer MACs" in prose(RESULTS)
    assert f"{left['test_accuracy']:.2f} %, {default['drop']:.2f} points below" in prose(RESULTS)
    times = [speed_up(default["dense"], left, batch) for batch in ("batch 1", "batch 256")]
    assert "{:.2f} times as fast at batch 1, {:.2f} at batch 256".format(*times) in prose(RESULTS)
    assert f"{default['dense']['training_flops'] / 1e14:.2f}e14 FLOPs" in prose(RESULTS)


def test_what_the_text_says_of_filters_beside_torch_pruning():
    by = {}
    for run in bench("filters")["runs"]:
        by.setdefault((run["by"], run["target_params"]), []).append(run["pruned"]["test_accuracy"])
        assert run["from_masked"] < 1e-12
    for ours, told in (
        ("ours", "are {} and {} points more accurate"),
        ("ours, its MACs", "they differ by {} and {} points"),
    ):
        pairs = [(by[ours, target], by["torch-pruning", target]) for target in (380_528, 230_000)]
        apart = [spread(accuracy - other for accuracy, other in zip(*pair, strict=True)) for pair in pairs]
        assert told.format(*apart) in prose(BENCHMARKS)
    faster = {}
    for point in bench("filters")["summary"]["pruned"]:
        faster.setdefault(point["by"], []).append(point["speed_up_256"]["mean"])
    told = "its networks are the faster ones, {:.2f} and {:.2f} times against {:.2f} and {:.2f}"
    assert told.format(*faster["torch-pruning"], *faster["ours"]) in prose(BENCHMARKS)
    assert "{:.2f} and {:.2f} with its multiply-adds".format(*faster["ours, its MACs"]) in prose(BENCHMARKS)


def test_what_the_text_says_of_each_layer_alone():
    sensitivity = report.load(REFERENCE / "structured_cifar_sensitivity.json")
    dense, drops = sensitivity["test_accuracy"], {}
    for layer in sensitivity["layers"]:
        (point,) = [point for point in layer["points"] if point["threshold"] == 0.5]
        assert 0.3 < 1 - point["kept"] / layer["filters"] < 0.4
        drops[dense - point["test_accuracy"]] = layer["layer"]
    (least, robust), *_, (most, sensitive) = sorted(drops.items())
    assert f"as the Intel Xeon trains it, {dense:.2f} %" in prose(RESULTS)
    assert f"least in {robust}, {least:.2f} points, and most in {sensitive}, {most:.2f}." in prose(RESULTS)


def test_what_the_text_says_of_torch_pruning():
    rows, times, later, memory = bench("networks")["rows"], [], [], []
    differences, changes = ([line["ours"][key] for line in rows.values()] for key in ("difference", "change"))
    assert max(differences) < 1e-9
    assert f"All {len(rows)} take a training step" in prose(BENCHMARKS)
    assert f"on {len(rows)} networks, all of torchvision's" in prose(BENCHMARKS)
    assert f"differ from masking by at most {max(differences):.1e} of the largest output" in prose(BENCHMARKS)
    assert f"changes the outputs by at least {min(changes):.2f} of it" in prose(BENCHMARKS)
    none = [name for name, line in rows.items() if "parameters_left" not in line["seconds"].get("torch-pruning", {})]
    waited = [name for name in none if rows[name]["torch-pruning"]["error"].startswith("no answer within")]
    assert f"has no answer on {len(none)}:" in prose(BENCHMARKS)
    assert Counter(name[:4] for name in waited) == {"swin": 5, "maxv": 1}
    assert Counter(name[:4] for name in none) == {"swin": 9, "shuf": 4, "maxv": 1}
    amplified = rows["efficientnet_b7"]["torch-pruning"]["difference"]
    assert f"In efficientnet_b7 it is {amplified:.1e} off" in prose(BENCHMARKS)
    for line in rows.values():
        ours, theirs = line["seconds"]["ours"], line["seconds"].get("torch-pruning", {})
        assert line["ours"]["trains"]
        if "parameters_left" not in theirs:
            continue
        assert ours["parameters_left"] < theirs["parameters_left"] + 0.001, "of no network more"
        if abs(ours["parameters_left"] - theirs["parameters_left"]) < 0.001:
            times.append(statistics.median(ours["seconds"]) / statistics.median(theirs["seconds"]))
            later.append(statistics.median(ours["seconds"]) - statistics.median(theirs["seconds"]))
            memory.append(ours["peak_mib"] / theirs["peak_mib"])
    told = (
        f"takes {min(times):.2f} to {max(times):.1f} times the time of torch-pruning, {statistics.median(times):.2f} in"
    )
    assert told in prose(BENCHMARKS)
    assert f"longer on {sum(time > 1 for time in times)} of {len(times)} networks" in prose(BENCHMARKS)
    assert f"but by {max(later):.2f} s at most; and at most {max(memory):.2f} of its memory" in prose(BENCHMARKS)


def test_what_the_text_says_of_timm():
    rows = bench("families")["rows"]
    differences, left = (sorted(row[key] for row in rows.values()) for key in ("difference", "left"))
    assert all(row["trains"] for row in rows.values())
    assert f"All {len(rows)} are cut" in prose(BENCHMARKS)
    assert f"masked by at most {differences[-1]:.1e} of the largest output" in prose(BENCHMARKS)
    assert f"{len(rows) - 1} of them by at most {differences[-2]:.1e}" in prose(BENCHMARKS)
    least, second = sorted((row["change"], name) for name, row in rows.items())[:2]
    told = f"at least {second[0]:.3f} of the largest, but for {least[1]}, whose outputs hardly depend on anything"
    assert f"{told} before training, by {least[0]:.1e}" in prose(BENCHMARKS)
    more = [row["fixed"] for row in rows.values() if row["left"] > 0.5]
    assert f"the median is {statistics.median(left):.3f}, and {len(more)} networks keep more" in prose(BENCHMARKS)
    written = sum("a size that is written into the network" in (reason or "") for reason in more)
    assert f"{written} of them have a size that is written" in prose(BENCHMARKS)


def test_what_the_text_says_of_random_networks():
    removal, compaction = (bench("fuzz")[kind] for kind in ("remove_filters", "compact"))
    assert removal["networks"] == compaction["networks"] == 2000
    assert removal["failures"] == compaction["failures"] == []
    assert f"by at most {removal['largest_difference']:.1e} of the largest output" in prose(BENCHMARKS)
    assert f"at two image sizes, by at most {compaction['largest_difference']:.1e}" in prose(BENCHMARKS)
    assert f"Of all filters {100 * removal['fixed'] / removal['filters']:.0f} % are fixed" in prose(BENCHMARKS)
    assert f"On average {100 * removal['mean_removed_of_marked']:.0f} % of the marked" in prose(BENCHMARKS)


def test_what_the_text_says_of_faults():
    campaign, caught, alone, ended, failures = bench("faults"), 0, 0, 0, []
    for part in ("killed", "killed_under_torchrun"):
        failures += campaign[part]["failures"]
        for outcome, count in campaign[part]["outcomes"].items():
            caught += count * ("resumed" in outcome)
            alone += count * ("one rank killed, resumed" in outcome)
            ended += count * ("had finished" in outcome)
    told = f"Of the {caught + ended} runs that were killed {caught} were caught at work, in {alone} of them one of"
    assert told in prose(BENCHMARKS)
    assert f"{ended} had ended or begun nothing" in prose(BENCHMARKS)
    assert f"{caught + ended - len(failures)} of {caught + ended} came to the files" in prose(BENCHMARKS)
    refused = campaign["command_lines"]
    assert f"{sum(refused['outcomes'].values())} of {refused['tries']} wrong command lines" in prose(BENCHMARKS)
    assert refused["failures"] == campaign["files"]["failures"] == []


def cut_only():
    """The default cutoff on three seeds, not fine-tuned."""
    return report.load(REFERENCE / "cut_only/structured_cifar_sweep.json")["runs"]


def test_the_index_of_a_filter_does_not_decide_its_fate():
    """Neither is the importance a function of the index, nor are the first filters kept; on any seed."""
    (default,) = report.load(REFERENCE / "structured_cifar.json")["runs"]
    assert default["pruned"]["parameters"] == cut_only()[0]["pruned"]["parameters"]
    correlations, left = [], {}
    for run in cut_only():
        left[run["seed"]] = run["pruned"]["parameters"]
        correlations += [spearman_with_index(layer["scores"]) for layer in run["layers"]]
    assert max(map(abs, correlations)) < 0.35
    assert f"at most {max(map(abs, correlations)):.2f}" in prose(RESULTS)
    assert list(left) == [0, 1, 2]
    assert "leaves {:,}, {:,} and {:,} parameters on seeds 0, 1 and 2".format(*left.values()) in prose(RESULTS)


def test_how_a_filter_starts_hardly_decides_its_fate():
    """In which layers the filters that start as identities are kept as often as the others."""
    kept = {}  # by layer: of identities and of others, how many are kept and how many there are
    for run in cut_only():
        torch.manual_seed(run["seed"])
        untrained = CifarCNN()
        for layer in run["layers"]:
            identity = (untrained.get_submodule(layer["layer"]).weight != 0).flatten(1).sum(1) == 1
            strongest = torch.tensor(layer["scores"]).argsort(descending=True, stable=True)[: layer["kept"]]
            counts = kept.setdefault(layer["layer"], torch.zeros(2, 2, dtype=torch.int64))
            for row_index, kind in enumerate((identity, ~identity)):
                counts[row_index] += torch.tensor([int(kind[strongest].sum()), int(kind.sum())])
    (identities, others), rest = (
        kept.pop("conv1").tolist(),
        torch.stack([counts for counts in kept.values() if counts[1, 1]]),
    )
    told = "identities are kept less often: {} of {}, and {} of {} other filters".format(*identities, *others)
    assert told in prose(RESULTS)
    shares = 100 * rest[:, :, 0] / rest[:, :, 1]  # (layers, 2)
    assert f"{shares.min():.0f} to {shares.max():.0f} % of both" in prose(RESULTS)


def spearman_with_index(scores):
    """Without ties, that of ranks: 1 - 6 Σd² / (n (n² - 1))."""
    ranks = torch.tensor(scores).argsort().argsort()
    n, distance = len(scores), ranks - torch.arange(len(scores))
    return 1 - 6 * int(distance.square().sum()) / (n * (n**2 - 1))


def test_every_file_that_the_readmes_link_to_is_there():
    for folder, text in (("", README), ("results", RESULTS), ("benchmarks", BENCHMARKS)):
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert (ROOT / folder / link).exists(), link


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_what_a_users_runs_write_is_not_for_git_and_the_reference_is():
    """So both commands of the README work in either order and leave `git status` empty."""
    names = ["unstructured_mnist", "structured_cifar", "unstructured_mnist_sweep", "structured_cifar_sweep"]
    written = [f"results/{name}{end}" for name in names for end in (".json", ".png", ".pt", ".pt2")]
    written += ["results/structured_cifar_dense.pt", "results/structured_cifar_sensitivity.json", "results/.run/lock"]
    ignored = subprocess.run(["git", "check-ignore", *written], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ignored.stdout.split() == written
    kept = [str(path) for path in REFERENCE.rglob("*.*")]
    ignored = subprocess.run(["git", "check-ignore", *kept], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ignored.stdout == ""
