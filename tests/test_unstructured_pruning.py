"""The real script, from the command line, on a small part of the real data."""

import json
import resource
import signal
import statistics

import pytest
import torch

from experiment import plots
from experiment.journal import Checkpoint
from experiment.profiling import parameters
from experiment.results import load_model
from experiment.training import evaluate
from models.mnist_cnn import MnistCNN
from pruning.magnitude import prunable_weights, sparsity
from tests.reports import comparable

SCRIPT = "unstructured_pruning.py"
QUICK = ("--train_size", 2000, "--epochs", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def half(run_to_end):
    """A quick run that says nothing of pruning: half of the weights go."""
    folder, printed = run_to_end(SCRIPT, *QUICK)
    return folder, printed, json.loads((folder / "unstructured_mnist.json").read_text())


def test_half_of_the_weights_are_zero_by_default_in_the_file_too(half):
    folder, printed, results = half
    model = load_model(folder / "unstructured_mnist.pt", MnistCNN)
    zeros = sum(int((weight == 0).sum()) for weight in prunable_weights(model).values())
    assert zeros == 215_250
    assert results["pruned"]["sparsity"] == 0.5
    assert results["dense"]["parameters"] == 431_080
    assert results["pruned"]["nonzero_parameters"] <= 431_080 - 215_250
    assert (folder / "unstructured_mnist.pt").stat().st_size == results["pruned"]["checkpoint_bytes"]
    assert results["pruned"]["checkpoint_bytes"] < 0.6 * results["dense"]["checkpoint_bytes"]
    assert "215,250" in printed
    assert f"{results['pruned']['test_accuracy']:.2f}" in printed


def test_the_reported_accuracy_is_that_of_the_file(half, mnist):
    folder, _, results = half
    model = load_model(folder / "unstructured_mnist.pt", MnistCNN).to(memory_format=torch.channels_last)
    assert evaluate(model, mnist) == results["pruned"]["test_accuracy"]
    assert results["drop"] == pytest.approx(results["dense"]["test_accuracy"] - results["pruned"]["test_accuracy"])
    assert results["pruned"]["test_accuracy"] > 60, "it learns, even from 2,000 examples in two epochs"


def test_compaction_keeps_the_accuracy_and_never_grows(half):
    results = half[2]
    compacted = results["compacted"]
    assert compacted["test_accuracy"] == pytest.approx(results["pruned"]["test_accuracy"], abs=0.02)  # 2 images
    assert compacted["parameters"] <= results["dense"]["parameters"]
    assert compacted["macs"]["compacted"] <= compacted["macs"]["dense"] == 2_293_000
    assert compacted["latency_ms"].keys() == {"batch 1", "batch 256"}
    assert parameters(MnistCNN(compacted["widths"])) == compacted["parameters"]


def test_files_written(half):
    folder, _, results = half
    names = {"unstructured_mnist.json", "unstructured_mnist.png", "unstructured_mnist.pt"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "unstructured_mnist.png").read_bytes() == plots.unstructured(results), "the JSON says it all"
    assert results["arguments"]["sparsity_target"] == [0.5]
    assert {"torch", "python", "device", "threads"} <= results["environment"].keys()
    assert [epoch["epoch"] for epoch in results["pruned"]["history"]] == [1, 2]


def test_a_run_that_is_stopped_twice_ends_as_the_one_that_was_not(half, stop_script, run_script, tmp_path):
    journal, flags = tmp_path / ".unstructured_mnist", (*QUICK, "--results_dir", tmp_path)
    status, message = stop_script(signal.SIGINT, journal / "seed 0 dense.pt", SCRIPT, *flags)
    assert status == 130
    assert message.endswith(f"--results_dir {tmp_path} --resume\n")
    assert len(message.splitlines()) == 1
    process = run_script(SCRIPT, *flags, "--resume", "--batch_size", 100)
    assert process.returncode == 2
    assert process.stderr == f"{SCRIPT}: --resume: the stopped run was not the same: --batch_size was 128\n"
    flags = (*flags, "--resume")
    status, _ = stop_script(signal.SIGKILL, journal / "seed 0 magnitude at 0.5.pt", SCRIPT, *flags)
    assert status == -signal.SIGKILL
    process = run_script(SCRIPT, *flags)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in half[0].iterdir()}
    resumed = json.loads((tmp_path / "unstructured_mnist.json").read_text())
    assert comparable(resumed) == comparable(half[2])
    assert (tmp_path / "unstructured_mnist.pt").read_bytes() == (half[0] / "unstructured_mnist.pt").read_bytes()


def test_a_file_that_cannot_be_written_ends_the_run_and_leaves_the_checkpoint_before_it(run_script, tmp_path):
    limit = 3_600_000  # bytes of a file: those of the dense training's checkpoint, but not also those of the masks
    process = run_script(
        SCRIPT,
        *(*QUICK, "--results_dir", tmp_path),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    journal = tmp_path / ".unstructured_mnist"
    wanted = journal / "seed 0 magnitude at 0.5.pt"
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"unstructured_pruning.py: {wanted}: File too large\n"
    assert {path.name for path in journal.iterdir()} == {"arguments.pt", "lock", "seed 0 dense.pt"}
    assert len(Checkpoint(journal / "seed 0 dense.pt").load()["history"]) == 2


def test_every_flag_is_alive(run_to_end):
    folder, _ = run_to_end(
        SCRIPT,
        *("--sparsity_target", 0.9, "--initial_sparsity", 0.1, "--begin_epoch", 0.5, "--end_epoch", 1.5),
        *("--frequency", 5, "--power", 2, "--scope", "lamp", "--epochs", 2, "--batch_size", 64),
        *("--method", "obd", "--label_smoothing", 0, "--shift_pixels", 1),
        *("--train_size", 1500, "--seed", 3, "--device", "cpu", "--precision", "float32", "--deterministic"),
    )
    results = json.loads((folder / "unstructured_mnist.json").read_text())
    cuts = results["pruned"]["cuts"]  # 1500 examples are 24 steps of 64
    assert [cut["step"] for cut in cuts] == [12, 17, 22, 27, 32, 36]
    planned = [0.9 - 0.8 * (1 - (step - 12) / 24) ** 2 for step in (12, 17, 22, 27, 32, 36)]
    assert [cut["planned"] for cut in cuts] == pytest.approx(planned)
    assert [cut["actual"] for cut in cuts] == [round(430_500 * value) / 430_500 for value in planned]
    assert results["seed"] == 3
    assert sparsity(load_model(folder / "unstructured_mnist.pt", MnistCNN)) == 387_450 / 430_500
    layers = {layer["layer"]: layer["nonzero"] / layer["weights"] for layer in results["pruned"]["layers"]}
    assert layers["conv1.weight"] > 0.3 > layers["fc1.weight"], "layer-adaptive scores spare the small layer"


def test_the_dense_network_teaches(half, run_to_end):
    """With nothing pruned all else is as in `test_sweep_shares_one_dense_network_per_seed`, but for the labels."""
    folder, _ = run_to_end(SCRIPT, *QUICK, "--sparsity_target", 0, "--distill", 0.9)
    results = comparable(json.loads((folder / "unstructured_mnist.json").read_text()))
    assert results["dense"] == comparable(half[2])["dense"]
    assert results["pruned"]["history"] != results["dense"]["history"]
    assert results["pruned"]["test_accuracy"] > 60


def test_sweep_shares_one_dense_network_per_seed(half, run_to_end):
    folder, printed = run_to_end(SCRIPT, *QUICK, "--sparsity_target", 0, 0.5, "--seed", 0, 1)
    assert {path.name for path in folder.iterdir()} == {"unstructured_mnist_sweep.json", "unstructured_mnist_sweep.png"}
    sweep = json.loads((folder / "unstructured_mnist_sweep.json").read_text())
    runs = comparable(sweep["runs"])
    assert [(run["seed"], run["sparsity_target"]) for run in runs] == [(0, 0), (0, 0.5), (1, 0), (1, 0.5)]

    nothing, alone = runs[0], comparable(half[2])
    assert nothing["pruned"]["history"] == nothing["dense"]["history"], "pruning is the only difference"
    assert nothing["drop"] == 0
    assert (runs[1]["dense"], runs[1]["pruned"]) == (alone["dense"], alone["pruned"])

    assert (folder / "unstructured_mnist_sweep.png").read_bytes() == plots.unstructured_sweep(sweep)
    accuracies = [runs[1]["pruned"]["test_accuracy"], runs[3]["pruned"]["test_accuracy"]]
    point = sweep["summary"]["pruned"][1]
    assert point["test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert point["test_accuracy"]["std"] == pytest.approx(statistics.stdev(accuracies))
    assert f"{sum(accuracies) / 2:.2f} ± {statistics.stdev(accuracies):.2f}" in printed


def test_methods_and_controls_side_by_side(run_to_end):
    small = ("--train_size", 1000, "--epochs", 2, "--device", "cpu", "--sparsity_target", 0.9)
    folder, printed = run_to_end(SCRIPT, *small, "--method", "shuffled", "magnitude", "--controls")
    sweep = json.loads((folder / "unstructured_mnist_sweep.json").read_text())
    assert [run["method"] for run in sweep["runs"]] == ["shuffled", "magnitude"]
    shuffled, magnitude = (run["pruned"] for run in sweep["runs"])
    assert shuffled["layers"] == magnitude["layers"], "as many of each layer"
    assert shuffled["history"] != magnitude["history"]
    assert "magnitude, 90 %" in printed
    assert "shuffled, 90 %" in printed
    scratch, point = sweep["runs"][0]["scratch"], sweep["summary"]["pruned"][0]
    assert scratch["layers"] == shuffled["layers"], "the same masks"
    assert scratch["nonzero_weights"] == 43_050
    assert scratch["history"] != shuffled["history"]
    assert point["scratch_accuracy"]["mean"] == scratch["test_accuracy"]
    assert "scratch" not in sweep["runs"][1], "it is a control of the first method"
    assert (folder / "unstructured_mnist_sweep.png").read_bytes() == plots.unstructured_sweep(sweep)


def test_help_explains_every_flag_and_its_default(run_script):
    process = run_script(SCRIPT, "--help")
    text = " ".join(process.stdout.split())
    assert process.returncode == 0
    for default in ("(default: 0.5)", "(default: 10)", "(default: 128)", "(default: 60000)", "(default: results)"):
        assert default in text
    assert "None" not in text
    assert "[0" not in text, "no list brackets either: nobody types those"


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["--sparsity_target", "1"], ["--sparsity_target", "'1'", "below 1"]),
        (["--sparsity_target", "-0.1"], ["--sparsity_target", "'-0.1'", "at least 0"]),
        (["--sparsity_target", "nan"], ["--sparsity_target", "'nan'"]),
        (["--sparsity_target", "half"], ["--sparsity_target", "'half'"]),
        (["--initial_sparsity", "0.6"], ["--initial_sparsity", "0.6", "0.5"]),
        (["--begin_epoch", "5", "--end_epoch", "4"], ["--begin_epoch 5", "--end_epoch 4", "begin <= end"]),
        (["--begin_epoch", "1e308"], ["--begin_epoch", "1e+308", "<= 10"]),
        (["--end_epoch", "11"], ["--end_epoch 11", "10"]),
        (["--frequency", "5000"], ["--frequency 5000", "1 to 2345"]),
        (["--frequency", "0"], ["--frequency", "'0'", "at least 1"]),
        (["--method", "obd", "--begin_epoch", "0", "--end_epoch", "0"], ["--method obd", "a later --begin_epoch"]),
        (["--label_smoothing", "1"], ["--label_smoothing", "'1'", "below 1"]),
        (["--shift_pixels", "28"], ["--shift_pixels", "'28'", "at most 27"]),
        (["--power", "0"], ["--power", "'0'", "above 0"]),
        (["--power", "inf"], ["--power", "'inf'"]),
        (["--epochs", "0"], ["--epochs", "'0'", "at least 1"]),
        (["--epochs", "1" + 400 * "0"], ["--epochs", "at most 100000"]),
        (["--epochs", "1.5"], ["--epochs", "'1.5'", "whole number"]),
        (["--batch_size", "0"], ["--batch_size", "'0'", "at least 1"]),
        (["--train_size", "60001"], ["--train_size", "'60001'", "60000"]),
        (["--seed", "0", "1", "0"], ["--seed 0 1 0", "each value once"]),
        (["--sparsity_target", "0.5", "0.50"], ["--sparsity_target 0.5 0.5", "each value once"]),
        (["--seed", "-1"], ["--seed", "'-1'", "at least 0"]),
        (["--scope", "row"], ["--scope", "'row'", "lamp"]),
        (["--device", "tpu"], ["--device", "'tpu'", "cuda"]),
        (["--results_dir", "README.md/results"], ["--results_dir", "README.md/results", "writable"]),
        (["--precision", "float16"], ["--precision", "'float16'", "bfloat16"]),
        (["--resume"], ["--resume", "no stopped run"]),
        (["--data_dir", "README.md/data"], ["--data_dir README.md/data", "README.md is a file"]),
        (["--sparsity", "0.5"], ["--sparsity"]),
        (["--speed", "9"], ["--speed"]),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(assert_refused, arguments, mentions):
    assert_refused(SCRIPT, arguments, mentions)


def test_bad_use_from_a_shell(run_script, tmp_path):
    process = run_script(SCRIPT, "--results_dir", tmp_path / "results", "--speed", "9")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "unstructured_pruning.py: unrecognized arguments: --speed 9\n"
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_cuda_where_there_is_one(run_to_end):
    folder, _ = run_to_end(SCRIPT, *QUICK, "--device", "cuda", "--sparsity_target", 0.9)
    results = json.loads((folder / "unstructured_mnist.json").read_text())
    assert sparsity(load_model(folder / "unstructured_mnist.pt", MnistCNN)) == 387_450 / 430_500
    assert results["pruned"]["test_accuracy"] > 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(run_script, tmp_path):
    process = run_script(SCRIPT, "--device", "cuda", "--results_dir", tmp_path / "results")
    assert (process.returncode, len(process.stderr.splitlines())) == (2, 1)
    assert "--device cuda" in process.stderr
