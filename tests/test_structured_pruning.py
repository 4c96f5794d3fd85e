"""The real script, from the command line or in this process, on a small part of the real data."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import structured_pruning
from benchmarks.short import TEST_SIZE
from experiment import measure, plots
from experiment.checkpoints import load_model, network_bytes
from experiment.measure import parameters
from experiment.training import Recipe, evaluate, fit, sgd
from models.cifar_cnn import CifarCNN
from models.mnist_cnn import MnistCNN
from pruning.filters import METHODS, THRESHOLD_MODES, filter_scores, filters_to_keep, mark_weakest
from pruning.surgery import remove_filters
from tests.processes import exit_code_of

SCRIPT = "structured_pruning.py"
QUICK = ("--train_size", 500, "--epochs", 1, "--fine_tune_epochs", 1, "--batch_size", 20, "--device", "cpu")
FILES = {f"structured_cifar{end}" for end in (".json", ".png", ".pt", ".pt2", "_dense.pt")}


@pytest.fixture(scope="module")
def half(run_to_end):
    """A quick run to half of the parameters, evaluated on few images."""
    folder, printed = run_to_end(f"-m benchmarks.short {SCRIPT}", *QUICK, "--target_params", 380_528)
    report = json.loads((folder / "structured_cifar.json").read_text())
    return folder, printed, report, report["runs"][0]


@pytest.fixture
def again(half, in_process):
    """The script on the dense network of `half`, without fine-tuning."""
    baseline = half[0] / "structured_cifar_dense.pt"
    return partial(in_process, SCRIPT, "--baseline", baseline, "--fine_tune_epochs", 0)


def test_half_of_the_parameters_are_removed(half):
    folder, printed, report, run = half
    dense, pruned = run["dense"], run["pruned"]
    assert dense["parameters"] == 767_936
    assert 0.995 * 380_528 < pruned["parameters"] <= 380_528
    assert pruned["widths"] == [layer["kept"] for layer in run["layers"]]
    for kept, width in zip(pruned["widths"], dense["widths"], strict=True):
        assert 0.55 < kept / width < 0.85, "all layers are thinned alike"
    assert 1.7 * pruned["macs"] < dense["macs"] == 57_986_536
    assert pruned["checkpoint_bytes"] < 0.52 * dense["checkpoint_bytes"]
    assert pruned["latency_ms"].keys() == dense["latency_ms"].keys() == {"batch 1", "batch 256"}
    assert len(dense["history"]) == len(pruned["history"]) == 1
    assert run["drop"] == pytest.approx(run["longer"]["test_accuracy"] - pruned["test_accuracy"])
    assert run["drop_from_baseline"] == pytest.approx(dense["test_accuracy"] - pruned["test_accuracy"])
    assert pruned["test_accuracy"] > 20, "it learns, even from 500 examples in two epochs"
    assert f"{pruned['parameters']:,}" in printed
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "structured_cifar.png").read_bytes() == plots.structured(report), "the JSON says it all"


def test_the_files_hold_the_networks_that_the_report_speaks_of(half, cifar10):
    folder, _, _, run = half
    few = replace(cifar10, test_images=cifar10.test_images[:TEST_SIZE], test_labels=cifar10.test_labels[:TEST_SIZE])
    dense = load_model(folder / "structured_cifar_dense.pt", CifarCNN).to(memory_format=torch.channels_last)
    pruned = load_model(folder / "structured_cifar.pt", CifarCNN).to(memory_format=torch.channels_last)
    assert evaluate(dense, few) == run["dense"]["test_accuracy"] == run["dense"]["history"][-1]["test_accuracy"]
    assert evaluate(pruned, few) == run["pruned"]["test_accuracy"]
    assert parameters(pruned) == run["pruned"]["parameters"]
    scores = filter_scores(dense, example=cifar10.normalize(cifar10.test_images[:1]))
    for layer in run["layers"]:
        assert layer["scores"] == pytest.approx(scores[layer["layer"]].tolist())


def keep_logits(network, folder):
    model = load_model(network, CifarCNN)
    torch.save(model.eval()(torch.load(folder / "images.pt")).detach(), folder / "logits.pt")


def test_a_fresh_process_gives_identical_logits(half, cifar10, tmp_path):
    images = cifar10.normalize(cifar10.test_images[:8])
    logits = load_model(half[0] / "structured_cifar.pt", CifarCNN).eval()(images)
    torch.save(images, tmp_path / "images.pt")
    assert exit_code_of(keep_logits, half[0] / "structured_cifar.pt", tmp_path) == 0
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


def test_the_exported_program_needs_nothing_of_ours(half, cifar10, tmp_path):
    images = cifar10.normalize(cifar10.test_images[:5])
    logits = load_model(half[0] / "structured_cifar.pt", CifarCNN).eval()(images)
    torch.save(images, tmp_path / "images.pt")
    code = """if True:
        import sys, torch
        model = torch.export.load(sys.argv[1]).module()
        torch.save(model(torch.load("images.pt")).detach(), "logits.pt")
        assert not {"models", "pruning", "experiment"} & sys.modules.keys()"""
    command = [sys.executable, "-c", code, half[0] / "structured_cifar.pt2"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits)


def test_a_threshold_of_0_removes_nothing_and_says_so(again):
    printed, report = again("--threshold_mode", "relative", "--pruning_threshold", 0)
    (run,) = report["runs"]
    assert "nothing was pruned" in printed
    assert len({run[name]["test_accuracy"] for name in ("dense", "before_fine_tuning", "pruned")}) == 1
    assert run["pruned"]["widths"] == list(CifarCNN().widths)
    assert run["dense"]["history"] == run["pruned"]["history"] == []


def test_a_cutoff_above_every_norm_keeps_the_most_important_filter_and_says_so(again):
    printed, report = again("--threshold_mode", "absolute", "--pruning_threshold", 1000, "--round_to", 2)
    (run,) = report["runs"]
    assert run["all_below"] == [f"conv{layer}" for layer in range(1, 7)]
    assert "conv3: every filter is below the cutoff" in printed
    assert run["pruned"]["widths"] == [2] * 6, "rounded up"


def test_sweep_prunes_one_dense_network_several_times(again):
    printed, sweep = again("--threshold_mode", "quantile", "--pruning_threshold", 0.25, 0.5)
    assert [run["pruning_threshold"] for run in sweep["runs"]] == [0.25, 0.5]
    assert [run["pruned"]["widths"] for run in sweep["runs"]] == [
        [width - int(fraction * width) for width in CifarCNN().widths] for fraction in (0.25, 0.5)
    ]
    assert len({run["dense"]["test_accuracy"] for run in sweep["runs"]}) == 1
    point = sweep["summary"]["pruned"][1]
    assert point["parameters"]["mean"] == sweep["runs"][1]["pruned"]["parameters"]
    assert f"{point['parameters']['mean']:,}" in printed
    assert plots.structured_sweep(sweep)


def test_sensitivity_prunes_one_layer_at_a_time(again):
    printed, report = again("--sensitivity", "--threshold_mode", "quantile", "--pruning_threshold", 0, 0.5)
    assert [layer["layer"] for layer in report["layers"]] == [f"conv{layer}" for layer in range(1, 7)]
    for layer, width in zip(report["layers"], CifarCNN.WIDTHS, strict=True):
        whole, half = layer["points"]
        assert whole == {"threshold": 0, "kept": width, "test_accuracy": report["test_accuracy"]}
        assert half["kept"] == width - width // 2
        assert f"{half['test_accuracy']:.2f} ({half['kept']})" in printed
    assert plots.sensitivity(report)


def test_controls_have_the_same_effort(in_process):
    small = ("--train_size", 100, "--batch_size", 50, "--epochs", 1, "--fine_tune_epochs", 1)
    printed, report = in_process(SCRIPT, "--controls", "--target_params", 380_528, *small)
    (run,) = report["runs"]
    dense, pruned, longer, scratch = (run[name] for name in ("dense", "pruned", "longer", "scratch"))
    assert len(longer["history"]) == len(pruned["history"]) == 1
    flops = 6 * pruned["macs"] * 100 * len(scratch["history"])
    assert flops == pytest.approx(dense["training_flops"] + pruned["training_flops"], rel=0.2)
    for control in (longer, scratch):
        assert control["test_accuracy"] == control["history"][-1]["test_accuracy"]
        assert f"{control['test_accuracy']:.2f}" in printed


def test_other_methods_prune_to_the_same_size(again):
    methods = ["l1", "fpgm", "bn_scale", "taylor", "layerwise_random", "random"]
    runs = again("--method", *methods, "--target_params", 380_528, "--train_size", 500)[1]["runs"]
    assert [run["method"] for run in runs] == methods
    for run in runs:
        assert 0.995 * 380_528 < run["pruned"]["parameters"] <= 380_528
    assert len({tuple(map(tuple, (layer["scores"] for layer in run["layers"]))) for run in runs}) == len(methods)


@pytest.mark.parametrize("mode", THRESHOLD_MODES)
def test_targets_are_used_up_in_every_mode(half, cifar10, mode):
    dense = load_model(half[0] / "structured_cifar_dense.pt", CifarCNN)
    point = structured_pruning.Point(0, "l2", structured_pruning.Cutoff("target_macs", 20e6, mode))
    marked = structured_pruning.choose_filters(dense, cifar10, point)["marked"]
    narrow = structured_pruning.remove(dense, cifar10, marked)
    assert 0.99 * 20e6 < measure.macs(narrow, torch.zeros(1, 3, 32, 32)) <= 20e6


def test_a_latency_target_is_one_for_the_measured_time(again, monkeypatch):
    """With a clock that tells the square of the parameters: half of the time takes 1 / sqrt(2) of the parameters."""
    times = lambda networks, batch: {name: parameters(network) ** 2 for name, network in networks.items()}  # noqa: E731
    monkeypatch.setattr(measure, "latency_ms", times)
    (run,) = again("--target_latency", 0.5)[1]["runs"]
    assert 0.99 * 767_936 < 2**0.5 * run["pruned"]["parameters"] <= 767_936
    assert run["target_latency"] == 0.5


def test_a_latency_out_of_reach_is_refused(assert_refused, monkeypatch):
    monkeypatch.setattr(measure, "latency_ms", lambda networks, batch: {"narrow": 1.0, "dense": 8.0})
    assert_refused(SCRIPT, ["--target_latency", "0.001"], ["--target_latency 0.001", "allowed: 0.125 to 1"])


def test_the_filters_that_are_pruned_follow_a_permutation_of_the_untrained_network(cifar10):
    """What is decided is not the index: with the filters of a layer in another order, the same ones are pruned."""
    few, recipe = few_of(cifar10, 200), Recipe(epochs=1, batch_size=50, **structured_pruning.RECIPE)
    model = structured_pruning.untrained(few, 0)
    order = torch.randperm(124, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(model)
    other.conv3.weight.data = other.conv3.weight.data[order]
    other.conv4.weight.data = other.conv4.weight.data[:, order]
    marked = []
    for network in (model, other):
        fit(network, sgd(network, recipe), few, recipe, 0)
        scores = structured_pruning.importance(network, few, "l2", 0)
        marked.append(mark_weakest(scores, filters_to_keep(scores, 0.5)))
    assert marked[0]["conv3"].sum() > 20
    assert (marked[0]["conv3"][order] == marked[1]["conv3"]).float().mean() > 0.95, "but for rounding"
    assert not torch.equal(marked[0]["conv3"], marked[1]["conv3"])


def test_every_method_and_mode_of_the_technique_is_offered(run_script):
    text = "".join(run_script(SCRIPT, "--help").stdout.split())
    assert "--method{" + ",".join(METHODS) + "}" in text
    assert "--threshold_mode{" + ",".join(THRESHOLD_MODES) + "}" in text
    assert set(METHODS) <= set(plots.METHODS), "each can be drawn"


def few_of(cifar10, size):
    return replace(cifar10.first(size), test_images=cifar10.test_images[:10], test_labels=cifar10.test_labels[:10])


def test_same_seed_same_network(cifar10):
    few, recipe = few_of(cifar10, 200), Recipe(epochs=2, batch_size=50, **structured_pruning.RECIPE)

    def trained(seed):
        model = structured_pruning.untrained(few, seed)
        fit(model, sgd(model, recipe), few, recipe, seed)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    one = trained(1)
    assert torch.equal(one, trained(1))
    assert not torch.equal(one, trained(2))


def test_fine_tuning_moves_every_parameter_that_is_left(cifar10):
    few, recipe = few_of(cifar10, 100), Recipe(epochs=2, batch_size=50, **structured_pruning.RECIPE)
    model = structured_pruning.untrained(few, 0)
    marked = {f"conv{layer}": torch.arange(width) % 2 == 0 for layer, width in enumerate(model.widths, start=1)}
    model, _ = remove_filters(model, torch.randn(1, 3, 32, 32), marked)
    tuned, history = structured_pruning.fine_tune(model, few, recipe, 0)
    assert [epoch["step"] for epoch in history] == [2, 4]
    for name, parameter in tuned.named_parameters():
        still = parameter == model.get_parameter(name)
        assert still.all() if name == "whitening.weight" else not still.all(), name


def test_help_explains_every_flag_and_its_default(run_script):
    process = run_script(SCRIPT, "--help")
    text = " ".join(process.stdout.split())
    assert process.returncode == 0
    for default in (
        "(default: 0.5)",
        "(default: 5)",
        "(default: standardized)",
        "(default: 50000)",
        "(default: results)",
    ):
        assert default in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["--pruning_threshold", "-0.1"], ["--pruning_threshold", "'-0.1'", "at least 0"]),
        (["--pruning_threshold", "2", "--threshold_mode", "relative"], ["--pruning_threshold 2", "0 to 1", "relative"]),
        (["--pruning_threshold", "2", "--threshold_mode", "quantile"], ["--pruning_threshold 2", "quantile"]),
        (["--pruning_threshold", "nan"], ["--pruning_threshold", "'nan'"]),
        (["--threshold_mode", "rank"], ["--threshold_mode", "'rank'", "quantile"]),
        (["--target_params", "767937"], ["--target_params 767937", "to 767936"]),
        (["--target_params", "282"], ["--target_params 282", "283 to"]),
        (["--target_params", "300", "--round_to", "2"], ["--target_params 300"]),
        (["--target_params", "400000", "--pruning_threshold", "0.5"], ["--pruning_threshold", "--target_params"]),
        (["--target_params", "1" + 400 * "0"], ["--target_params", "whole number"]),
        (["--target_macs", "1e9"], ["--target_macs 1e+09", "to 5.79865e+07"]),
        (["--target_latency", "1.5"], ["--target_latency", "'1.5'", "at most 1"]),
        (["--controls", "none", "longer"], ["--controls none longer", "none"]),
        (["--target_params", "9999", "9999"], ["--target_params 9999 9999", "each value once"]),
        (["--round_to", "0"], ["--round_to", "'0'", "at least 1"]),
        (["--fine_tune_epochs", "-1"], ["--fine_tune_epochs", "'-1'", "at least 0"]),
        (["--epochs", "0"], ["--epochs", "'0'", "at least 1"]),
        (["--train_size", "50001"], ["--train_size", "'50001'", "50000"]),
        (["--held_out"], ["--held_out", "--train_size up to 49744"]),
        (["--controls", "--baseline", "nothing.pt"], ["--controls scratch", "cannot be combined with --baseline"]),
        (["--controls", "wide"], ["--controls", "'wide'", "scratch"]),
        (["--sensitivity", "--target_latency", "0.5"], ["--target_latency", "cannot be combined with --sensitivity"]),
        (["--sensitivity", "--target_params", "400000"], ["--target_params", "cannot be combined with --sensitivity"]),
        (["--sensitivity", "--threshold_mode", "absolute"], ["--threshold_mode absolute", "needs --pruning_threshold"]),
        (["--sensitivity", "--seed", "0", "1"], ["--seed", "one value with --sensitivity"]),
        (["--baseline", "nothing.pt"], ["--baseline nothing.pt", "No such file"]),
        (["--baseline", "README.md"], ["--baseline README.md", "not a checkpoint"]),
        (["--results_dir", "README.md/results"], ["--results_dir", "README.md/results", "writable"]),
        (["--threshold", "0.5"], ["--threshold"]),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(assert_refused, arguments, mentions):
    assert_refused(SCRIPT, arguments, mentions)


def test_a_checkpoint_of_another_network_is_refused(assert_refused, tmp_path):
    (tmp_path / "lenet.pt").write_bytes(network_bytes(MnistCNN()))
    assert_refused(SCRIPT, ["--baseline", tmp_path / "lenet.pt"], ["--baseline", "lenet.pt", "it holds a MnistCNN"])
