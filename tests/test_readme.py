"""The tables and the text of the READMEs say what the committed JSON says."""

import json
import re
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

from experiment import report
from experiment.report import speed_up, with_std

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
    error = with_std({**point["test_accuracy"], "mean": 100 - point["test_accuracy"]["mean"]})
    yield RESULTS, row("**1,500 weights, above**", f"{430_500 / 1_500:.0f}", "1,500", error)


def cifar_runs():
    """The default run, and the same network pruned at random with as many filters of each layer."""
    return [report.load(REFERENCE / path / "structured_cifar.json")["runs"][0] for path in ("", "layerwise_random")]


def cifar_rows():
    run, by_chance = cifar_runs()
    longer, dense = (f"{run[network]['test_accuracy']:.2f}" for network in ("longer", "dense"))
    yield RESULTS, row("dense, 12 + 5 epochs", "767,936", "", longer, "", "1", "1", "1")
    yield RESULTS, row("dense, 12 epochs", "767,936", "", dense, "", "1", "1", "1")
    yield README, row("dense, 12 + 5 epochs", "767,936", longer, "", "1", "1")
    for name, each in (("L2 norm", run), ("layer-wise random", by_chance)):
        pruned, times = each["pruned"], (each["dense"], each["pruned"])
        size, accuracy, drop = f"{pruned['parameters']:,}", f"{pruned['test_accuracy']:.2f}", f"{each['drop']:.2f}"
        macs = f"{each['dense']['macs'] / pruned['macs']:.2f}"
        speed = [f"{speed_up(*times, batch):.2f}" for batch in ("batch 1", "batch 256")]
        before = f"{each['before_fine_tuning']['test_accuracy']:.2f}"
        yield RESULTS, row(f"pruned by {name}", size, before, accuracy, drop, macs, *speed)
        yield README, row(f"pruned by {name} + 5 epochs", size, accuracy, drop, macs, speed[1])


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
    for way in bench("held_out")["ways"]:
        yield (
            BENCHMARKS,
            row(str(way["learning_rate"]), f"{way['held_out_accuracy']:.2f}", f"{way['held_out_loss']:.4f}"),
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


def test_what_the_text_says_of_cifar():
    run, by_chance = cifar_runs()
    assert by_chance["dense"]["test_accuracy"] == run["dense"]["test_accuracy"], "the same dense network"
    assert by_chance["pruned"]["widths"] == run["pruned"]["widths"], "as many filters of each layer"
    assert f"half of the parameters cost {run['drop']:.2f} points" in prose(README)
    apart = run["pruned"]["test_accuracy"] - by_chance["pruned"]["test_accuracy"]
    assert f"the norm is worth {apart:.2f} points beside chance" in prose(RESULTS)
    flops = run["dense"]["training_flops"]
    assert f"{flops / 1e14:.2f}e14 FLOPs" in prose(RESULTS)


def test_the_index_of_a_filter_does_not_decide_its_fate():
    """Neither is the importance a function of the index, nor are the first filters kept; on any seed."""
    sweep = report.load(REFERENCE / "cut_only/structured_cifar_sweep.json")
    (default, _), left = cifar_runs(), {}
    assert default["pruned"]["parameters"] == sweep["runs"][0]["pruned"]["parameters"]
    correlations = []
    for run in sweep["runs"]:
        left[run["seed"]] = run["pruned"]["parameters"]
        correlations += [spearman_with_index(layer["scores"]) for layer in run["layers"]]
    assert max(map(abs, correlations)) < 0.35
    assert f"at most {max(map(abs, correlations)):.2f}" in prose(RESULTS)
    assert "leaves {:,} and {:,} parameters on seeds 0 and 1".format(*left.values()) in prose(RESULTS)


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
