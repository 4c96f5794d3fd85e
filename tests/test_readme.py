"""The tables and the text of the READMEs say what the committed JSON says."""

import json
import re
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

from experiment import report
from experiment.report import mean_and_std, speed_up, with_std
from pruning.filters import filters_to_keep
from structured_pruning import parameters_with

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


def record_rows():
    record = report.load(REFERENCE / "record/unstructured_mnist_sweep.json")
    for run in record["runs"]:
        accuracies = (f"{run[network]['test_accuracy']:.2f}" for network in ("pruned", "dense"))
        yield RESULTS, row(f"seed {run['seed']}", f"{run['pruned']['nonzero_weights']:,}", *accuracies)
    (point,) = record["summary"]["pruned"]
    accuracy, drop = with_std(point["test_accuracy"]), with_std(point["drop"])
    yield README, row("99.65 % by saliency, 60 epochs", "1,500", accuracy, drop, "")


def cifar_rows():
    sweep, found = points("structured_cifar_sweep.json", "method", "target_params")
    dense, longer = with_std(sweep["summary"]["dense"]), with_std(found["l2", 380_528]["longer_accuracy"])
    yield RESULTS, row("dense + 5 epochs", "767,936", "", longer, "", "", "", "", "")
    yield RESULTS, row("dense", "767,936", "", dense, "", "", "1", "1", "1")
    yield README, row("dense + 5 epochs", "767,936", longer, "", "1", "1")
    yield README, row("dense", "767,936", dense, "", "1", "1")
    for target in sweep["arguments"]["target_params"]:
        point, by_chance = found["l2", target], found["layerwise_random", target]
        yield RESULTS, cifar_row(f"{target:,} asked for", point, by_chance)
        if target > 200_000:
            yield README, short_row("pruned + 5 epochs", point, by_chance)
    uniform = report.load(REFERENCE / "uniform/structured_cifar_sweep.json")["summary"]["pruned"]
    yield RESULTS, cifar_row("62 % of each layer", *uniform)
    yield README, short_row("62 % of each layer pruned + 5 epochs", uniform[0])


def cifar_row(name, point, by_chance):
    accuracies = (point["accuracy_before"], point["test_accuracy"], point["drop"], by_chance["test_accuracy"])
    costs = (point["macs_reduction"], point["speed_up_1"], point["speed_up_256"])
    return row(name, f"{point['parameters']['mean']:,.0f}", *map(with_std, (*accuracies, *costs)))


def short_row(name, point, by_chance=None):
    control = with_std(by_chance["test_accuracy"]) if by_chance else ""
    costs = (with_std(point["macs_reduction"]), with_std(point["speed_up_256"]))
    return row(name, f"{point['parameters']['mean']:,.0f}", with_std(point["test_accuracy"]), control, *costs)


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
    for cut in bench("filters")["cuts"]:
        pruned = cut["pruned"]
        yield (
            BENCHMARKS,
            row(
                f"{cut['kind']}, {cut['target_params']:,} asked for",
                f"{pruned['parameters']:,}",
                *(f"{cut[network]['test_accuracy']:.2f}" for network in ("before_fine_tuning", "pruned")),
                f"{cut['dense']['macs'] / pruned['macs']:.2f}",
                *(f"{speed_up(cut['dense'], pruned, batch):.2f}" for batch in ("batch 1", "batch 256")),
                f"{cut['from_masked']:.0e}",
            ),
        )
    for point in bench("weights")["summary"]:
        accuracies = (with_std(accuracy) for accuracy in point["test_accuracy"].values())
        yield BENCHMARKS, row(f"{100 * point['sparsity_target']:g} %", *accuracies, with_std(point["seconds_ratio"]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [*mnist_rows(), *record_rows(), *cifar_rows(), *bench_rows()],
    ids=lambda value: value[:60] if value.startswith("|") else "",
)
def test_every_row_of_the_tables_is_that_of_the_json(text, expected):
    assert expected in text


def test_the_readme_is_short_and_what_it_prints_is_what_the_script_prints():
    assert len(README.splitlines()) <= 120
    mnist = report.load(REFERENCE / "unstructured_mnist.json")
    (run,) = mnist["runs"]
    printed = [f"{run['pruned']['test_accuracy']:.2f}", f"{run['drop']:.2f}", f"{run['compacted']['parameters']:,}"]
    printed = ["magnitude,", "50", "%", f"{run['pruned']['nonzero_weights']:,}", *printed]
    printed.append(f"{speed_up(run['dense'], run['compacted'], 'batch 256'):.2f}")
    lines = [line.split() for line in README.splitlines()]
    assert printed in lines
    assert ["dense", f"{run['dense']['test_accuracy']:.2f}"] in lines


def test_what_the_text_says_of_mnist():
    (run,) = report.load(REFERENCE / "unstructured_mnist.json")["runs"]
    dense, pruned = run["dense"], run["pruned"]
    told = f"{dense['test_accuracy']:.2f} % dense, {pruned['test_accuracy']:.2f} % with exactly 215,250 weights at zero"
    assert told in prose(RESULTS)
    assert f"{pruned['checkpoint_bytes']:,} bytes instead of {dense['checkpoint_bytes']:,}" in prose(RESULTS)
    (record,) = report.load(REFERENCE / "record/unstructured_mnist_sweep.json")["summary"]["pruned"]
    told = f"reach {with_std(record['test_accuracy'])} %, which is {with_std(record['drop'])} points below the dense"
    assert told in prose(RESULTS)


def test_what_the_text_says_of_single_cifar_runs():
    (run,) = report.load(REFERENCE / "structured_cifar.json")["runs"]
    dense, before, pruned = (run[network]["test_accuracy"] for network in ("dense", "before_fine_tuning", "pruned"))
    told = f"{dense:.2f} % dense, {before:.2f} % before and {pruned:.2f} % after fine-tuning"
    assert told in prose(RESULTS)
    assert f"leaves {run['pruned']['parameters']:,} parameters" in prose(RESULTS)
    assert f"{speed_up(run['dense'], run['pruned'], 'batch 256'):.2f} times as fast at batch 256" in prose(RESULTS)
    correlations = [spearman_with_index(layer["scores"]) for layer in run["layers"][3:]]
    assert "Spearman correlation {:.3f}, {:.3f} and {:.3f} in conv4".format(*correlations) in prose(RESULTS)
    assert all(-0.995 < correlation < -0.98 for correlation in correlations), "−0.98 to −0.99 in the README"


def spearman_with_index(scores):
    """Without ties, that of ranks: 1 - 6 Σd² / (n (n² - 1))."""
    ranks = torch.tensor(scores).argsort().argsort()
    n, distance = len(scores), ranks - torch.arange(len(scores))
    return 1 - 6 * int(distance.square().sum()) / (n * (n**2 - 1))


def test_what_the_text_says_of_the_filters_sweep():
    sweep = report.load(REFERENCE / "structured_cifar_sweep.json")
    runs = {}
    for run in sweep["runs"]:
        runs.setdefault((run["method"], run["target_params"]), []).append(run)

    def ahead(accuracies, others):
        return with_std(mean_and_std([one - other for one, other in zip(accuracies, others, strict=True)]))

    def accuracies(method, target, network="pruned"):
        return [run[network]["test_accuracy"] for run in runs[method, target]]

    loss = ahead(accuracies("l2", 380_528, "longer"), accuracies("l2", 380_528))
    assert f"half of the parameters lose {loss} points against it" in prose(RESULTS)
    assert f"Half of the parameters cost {loss} points beside the dense network" in prose(README)
    half, third = (
        ahead(accuracies("l2", target), accuracies("layerwise_random", target)) for target in (380_528, 230_000)
    )
    assert f"costs {half} points more than the norm at half, {third} at 230,000" in prose(RESULTS)
    narrowest = [min(run["pruned"]["widths"]) for run in runs["l2", 120_000]]
    assert "the narrowest layer {}, {} and {} filters".format(*narrowest) in prose(RESULTS)
    assert "end at {:.2f}, {:.2f} and {:.2f} %".format(*accuracies("l2", 120_000)) in prose(RESULTS)


def test_what_the_text_says_of_each_layer_alone():
    sensitivity = report.load(REFERENCE / "structured_cifar_sensitivity.json")
    assert f"Each layer of a network of {sensitivity['test_accuracy']:.2f} % pruned alone" in prose(RESULTS)
    at_half = {}
    for layer in sensitivity["layers"]:
        (point,) = (point for point in layer["points"] if point["threshold"] == 0.5)
        at_half[layer["layer"]] = (layer["filters"], point["kept"], point["test_accuracy"])
    filters, kept, accuracy = at_half["conv6"]
    lost = sensitivity["test_accuracy"] - accuracy
    assert f"loses {filters - kept} of its {filters} filters for {lost:.2f} points" in prose(RESULTS)
    assert all(at_half[layer][0] == at_half[layer][1] for layer in ("conv1", "conv2", "conv3"))


def test_half_of_the_highest_score_leaves_about_half_of_the_parameters_on_every_seed():
    """The scores are in the reports; which filters are kept at the default threshold follows from them."""
    left = {}
    runs = report.load(REFERENCE / "structured_cifar_sweep.json")["runs"]
    for run in (run for run in runs if run["method"] == "l2"):
        scores = {layer["layer"]: torch.tensor(layer["scores"]) for layer in run["layers"]}
        left[run["seed"]] = parameters_with(filters_to_keep(scores, 0.5))
    (default,) = report.load(REFERENCE / "structured_cifar.json")["runs"]
    assert left[0] == default["pruned"]["parameters"]
    for run in report.load(REFERENCE / "cut_only/structured_cifar_sweep.json")["runs"]:
        left[run["seed"]] = run["pruned"]["parameters"]
    assert sorted(left) == [0, 1, 2, 3, 4]
    assert all(350_000 <= parameters <= 390_000 for parameters in left.values()), left
    told = f"leaves {min(left.values()):,} to {max(left.values()):,} parameters on seeds 0 to 4"
    assert told in prose(RESULTS)


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
