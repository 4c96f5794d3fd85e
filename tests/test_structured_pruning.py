"""The real script, from the command line, on a small part of the real data."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import structured_pruning
from experiment import data, plots
from experiment.data import normalize
from experiment.profiling import parameters
from experiment.results import checkpoint, load_model
from experiment.training import evaluate
from models.cifar_cnn import CifarCNN
from models.mnist_cnn import MnistCNN
from pruning.filters import filter_scores
from pruning.surgery import remove_filters

SCRIPT = "structured_pruning.py"
QUICK = ("--train_size", 1000, "--epochs", 1, "--fine_tune_epochs", 1, "--batch_size", 20, "--device", "cpu")
FILES = {f"structured_cifar{end}" for end in (".json", ".png", ".pt", ".pt2", "_dense.pt")}


@pytest.fixture(scope="module")
def half(run_to_end, cifar10):
    """A quick run to half of the parameters."""
    folder, printed = run_to_end(SCRIPT, *QUICK, "--target_params", 380_528)
    return folder, printed, json.loads((folder / "structured_cifar.json").read_text())


@pytest.fixture
def in_process(cifar10, tmp_path, monkeypatch, capsys):
    """The script in this process, judged by few images for speed: in_process(flag, ...) -> (printed, JSON)."""
    few = replace(cifar10, test_images=cifar10.test_images[:64], test_labels=cifar10.test_labels[:64])
    monkeypatch.setattr(data, "load_cifar10", lambda folder: few)

    def in_process(*arguments):
        command = [SCRIPT, "--results_dir", tmp_path, "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        structured_pruning.main()
        (report,) = tmp_path.glob("*.json")
        return capsys.readouterr().out, json.loads(report.read_text())

    return in_process


@pytest.fixture
def again(half, in_process):
    """The same on the network of `half`, without fine-tuning."""
    return partial(in_process, "--baseline", half[0] / "structured_cifar_dense.pt", "--fine_tune_epochs", 0)


def test_half_of_the_parameters_are_gone(half):
    folder, printed, results = half
    dense, cut, pruned = (results[name] for name in ("dense", "cut", "pruned"))
    assert dense["parameters"] == 767_936
    assert 0.995 * 380_528 < pruned["parameters"] == cut["parameters"] <= 380_528
    assert pruned["widths"] == cut["widths"] == [layer["kept"] for layer in results["layers"]]
    assert pruned["widths"][:3] == dense["widths"][:3], "the layers that do most of the work stay whole"
    assert pruned["macs"] < dense["macs"] == 57_986_536
    assert pruned["checkpoint_bytes"] < 0.52 * dense["checkpoint_bytes"]
    assert pruned["latency_ms"].keys() == dense["latency_ms"].keys() == {"batch 1", "batch 256"}
    assert len(dense["history"]) == len(pruned["history"]) == 1
    assert results["drop"] == pytest.approx(dense["test_accuracy"] - pruned["test_accuracy"])
    assert pruned["test_accuracy"] > 20, "it learns, even from 1,000 examples in two epochs"
    assert f"{pruned['parameters']:,}" in printed
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "structured_cifar.png").read_bytes() == plots.structured(results), "the JSON says it all"


def test_the_files_hold_the_networks_that_the_report_speaks_of(half, cifar10):
    folder, _, results = half
    dense = load_model(folder / "structured_cifar_dense.pt", CifarCNN).to(memory_format=torch.channels_last)
    pruned = load_model(folder / "structured_cifar.pt", CifarCNN).to(memory_format=torch.channels_last)
    assert (
        evaluate(dense, cifar10)
        == results["dense"]["test_accuracy"]
        == results["dense"]["history"][-1]["test_accuracy"]
    )
    assert evaluate(pruned, cifar10) == results["pruned"]["test_accuracy"]
    assert parameters(pruned) == results["pruned"]["parameters"]
    scores = filter_scores(dense)
    for layer in results["layers"]:
        assert layer["scores"] == pytest.approx(scores[layer["layer"]].tolist())


def fresh_process(code, *arguments, cwd):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=120)


def test_a_fresh_process_gives_identical_logits(half, cifar10, tmp_path, request):
    images = normalize(cifar10.test_images[:8], cifar10.mean, cifar10.std)
    logits = load_model(half[0] / "structured_cifar.pt", CifarCNN).eval()(images)
    torch.save(images, tmp_path / "images.pt")
    code = """if True:
        import sys, torch
        from experiment.results import load_model
        from models.cifar_cnn import CifarCNN
        model = load_model(sys.argv[1], CifarCNN)
        torch.save(model.eval()(torch.load(sys.argv[2])).detach(), sys.argv[3])"""
    arguments = (half[0] / "structured_cifar.pt", tmp_path / "images.pt", tmp_path / "logits.pt")
    fresh_process(code, *arguments, cwd=request.config.rootpath)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


def test_the_exported_program_needs_nothing_of_ours(half, cifar10, tmp_path):
    images = normalize(cifar10.test_images[:5], cifar10.mean, cifar10.std)
    logits = load_model(half[0] / "structured_cifar.pt", CifarCNN).eval()(images)
    torch.save(images, tmp_path / "images.pt")
    code = """if True:
        import sys, torch
        model = torch.export.load(sys.argv[1]).module()
        torch.save(model(torch.load(sys.argv[2])).detach(), sys.argv[3])
        assert not {"models", "pruning", "experiment"} & sys.modules.keys()"""
    arguments = (half[0] / "structured_cifar.pt2", tmp_path / "images.pt", tmp_path / "logits.pt")
    fresh_process(code, *arguments, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits)


def test_a_threshold_of_0_cuts_nothing_and_says_so(again):
    printed, results = again("--pruning_threshold", 0)
    assert "nothing was cut" in printed
    assert len({results[name]["test_accuracy"] for name in ("dense", "cut", "pruned")}) == 1
    assert results["pruned"]["widths"] == list(CifarCNN().widths)
    assert results["dense"]["history"] == results["pruned"]["history"] == []


def test_a_cutoff_above_every_norm_leaves_the_strongest_and_says_so(again):
    printed, results = again("--threshold_mode", "absolute", "--pruning_threshold", 1000, "--round_to", 2)
    assert results["guarded"] == [f"conv{layer}" for layer in range(1, 7)]
    assert "conv3: every filter is below the cutoff" in printed
    assert results["pruned"]["widths"] == [2] * 6, "rounded up"


def test_sweep_cuts_one_dense_network_several_times(again):
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


def test_sensitivity_cuts_one_layer_at_a_time(again):
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
    printed, results = in_process("--controls", "--target_params", 380_528, *small)
    dense, pruned, longer, scratch = (results[name] for name in ("dense", "pruned", "longer", "scratch"))
    assert len(longer["history"]) == len(pruned["history"]) == 1
    flops = 6 * pruned["macs"] * 100 * len(scratch["history"])
    assert flops == pytest.approx(dense["training_flops"] + pruned["training_flops"], rel=0.2)
    for control in (longer, scratch):
        assert control["test_accuracy"] == control["history"][-1]["test_accuracy"]
        assert f"{control['test_accuracy']:.2f}" in printed


@pytest.mark.parametrize("method", ["l1", "fpgm", "bn_scale", "shuffled", "random"])
def test_other_methods_cut_to_the_same_size(again, method):
    results = again("--method", method, "--target_params", 380_528)[1]
    assert results["method"] == method
    assert 0.995 * 380_528 < results["pruned"]["parameters"] <= 380_528


def test_same_seed_same_network(cifar10):
    few = replace(cifar10.first(200), test_images=cifar10.test_images[:10], test_labels=cifar10.test_labels[:10])
    args = argparse.Namespace(train_size=200, batch_size=50, precision="float32", processes=1)

    def trained(seed):
        model = structured_pruning.untrained(seed, few)
        structured_pruning.train(args, seed, model, few, epochs=2, learning_rate=0.1)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_fine_tuning_moves_every_parameter_that_is_left(cifar10):
    few = replace(cifar10.first(100), test_images=cifar10.test_images[:10], test_labels=cifar10.test_labels[:10])
    model = structured_pruning.untrained(0, few)
    marked = {f"conv{layer}": torch.arange(width) % 2 == 0 for layer, width in enumerate(model.widths, start=1)}
    model, _ = remove_filters(model, torch.randn(1, 3, 32, 32), marked)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    args = argparse.Namespace(train_size=100, batch_size=50, precision="float32", processes=1)
    history = structured_pruning.train(args, 0, model, few, epochs=2, learning_rate=0.1)
    assert [epoch["step"] for epoch in history] == [2, 4]
    for name, parameter in model.named_parameters():
        still = parameter == before[name]
        assert still.all() if name == "whitening.weight" else not still.all(), name


def test_help_explains_every_flag_and_its_default(run_script):
    process = run_script(SCRIPT, "--help")
    text = " ".join(process.stdout.split())
    assert process.returncode == 0
    for default in ("(default: 0.5;", "(default: 5)", "(default: relative)", "(default: 50000)", "(default: results)"):
        assert default in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["--pruning_threshold", "-0.1"], ["--pruning_threshold", "'-0.1'", "at least 0"]),
        (["--pruning_threshold", "1.1"], ["--pruning_threshold 1.1", "0 to 1", "relative"]),
        (["--pruning_threshold", "2", "--threshold_mode", "quantile"], ["--pruning_threshold 2", "quantile"]),
        (["--pruning_threshold", "nan"], ["--pruning_threshold", "'nan'"]),
        (["--threshold_mode", "rank"], ["--threshold_mode", "'rank'", "quantile"]),
        (["--target_params", "767937"], ["--target_params 767937", "to 767936"]),
        (["--target_params", "282"], ["--target_params 282", "283 to"]),
        (["--target_params", "300", "--round_to", "2"], ["--target_params 300"]),
        (["--target_params", "400000", "--pruning_threshold", "0.5"], ["--pruning_threshold", "--target_params"]),
        (["--target_params", "400000", "--threshold_mode", "quantile"], ["--threshold_mode quantile", "relative"]),
        (["--target_params", "9999", "9999"], ["--target_params 9999 9999", "each value once"]),
        (["--round_to", "0"], ["--round_to", "'0'", "at least 1"]),
        (["--fine_tune_epochs", "-1"], ["--fine_tune_epochs", "'-1'", "at least 0"]),
        (["--epochs", "0"], ["--epochs", "'0'", "at least 1"]),
        (["--train_size", "50001"], ["--train_size", "'50001'", "50000"]),
        (["--controls", "--baseline", "nothing.pt"], ["--controls scratch", "without --baseline"]),
        (["--controls", "wide"], ["--controls", "'wide'", "scratch"]),
        (["--sensitivity", "--target_params", "400000"], ["--target_params", "without --sensitivity"]),
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
    (tmp_path / "lenet.pt").write_bytes(checkpoint(MnistCNN()))
    assert_refused(SCRIPT, ["--baseline", tmp_path / "lenet.pt"], ["--baseline", "lenet.pt", "it holds a MnistCNN"])
