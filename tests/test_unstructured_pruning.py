"""The real script, from the command line or in this process, on a small part of the real data."""

import json
import resource
import signal
import statistics

import pytest
import torch

from experiment import plots
from experiment.checkpoints import Checkpoint, load_model
from experiment.measure import parameters
from experiment.training import evaluate
from models.mnist_cnn import MnistCNN
from pruning.magnitude import METHODS, SCOPES, prunable_weights, sparsity
from tests.reports import comparable, results_of

SCRIPT = "unstructured_pruning.py"
QUICK = ("--train_size", 2000, "--epochs", 2, "--device", "cpu")
FILES = {f"unstructured_mnist{end}" for end in (".json", ".png", ".pt", ".pt2")}


@pytest.fixture(scope="module")
def half(run_to_end):
    """A quick run that says nothing of pruning: half of the weights are pruned."""
    folder, printed = run_to_end(SCRIPT, *QUICK)
    report = json.loads((folder / "unstructured_mnist.json").read_text())
    return folder, printed, report, report["runs"][0]


def test_half_of_the_weights_are_zero_by_default_in_the_file_too(half):
    folder, printed, _, run = half
    model = load_model(folder / "unstructured_mnist.pt", MnistCNN)
    zeros = sum(int((weight == 0).sum()) for weight in prunable_weights(model).values())
    assert zeros == 215_250
    assert run["pruned"]["sparsity"] == 0.5
    assert run["dense"]["parameters"] == 431_080
    assert run["pruned"]["nonzero_parameters"] <= 431_080 - 215_250
    assert (folder / "unstructured_mnist.pt").stat().st_size == run["pruned"]["checkpoint_bytes"]
    assert run["pruned"]["checkpoint_bytes"] < 0.6 * run["dense"]["checkpoint_bytes"]
    assert "seed 0 dense: epoch 2 of 2, " in printed, "without a terminal each epoch is a line"
    assert "215,250" in printed
    assert f"{run['pruned']['test_accuracy']:.2f}" in printed


def test_the_reported_accuracy_is_that_of_the_file(half, mnist):
    folder, _, _, run = half
    model = load_model(folder / "unstructured_mnist.pt", MnistCNN).to(memory_format=torch.channels_last)
    assert evaluate(model, mnist) == run["pruned"]["test_accuracy"]
    assert run["drop"] == pytest.approx(run["dense"]["test_accuracy"] - run["pruned"]["test_accuracy"])
    assert run["pruned"]["test_accuracy"] > 60, "it learns, even from 2,000 examples in two epochs"


def test_compaction_keeps_the_accuracy_and_never_grows(half, mnist):
    folder, _, _, run = half
    compacted = run["compacted"]
    assert compacted["test_accuracy"] == pytest.approx(run["pruned"]["test_accuracy"], abs=0.02)  # 2 images
    assert compacted["parameters"] <= run["dense"]["parameters"]
    assert compacted["macs"] <= run["dense"]["macs"] == 2_293_000
    assert compacted["latency_ms"].keys() == run["dense"]["latency_ms"].keys() == {"batch 1", "batch 256"}
    assert parameters(MnistCNN(compacted["widths"])) == compacted["parameters"]
    images = mnist.normalize(mnist.test_images[:7])
    pruned = load_model(folder / "unstructured_mnist.pt", MnistCNN)
    program = torch.export.load(folder / "unstructured_mnist.pt2").module()
    torch.testing.assert_close(program(images), pruned(images), rtol=1e-4, atol=1e-4)


def test_files_written(half):
    folder, _, report, run = half
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "unstructured_mnist.png").read_bytes() == plots.unstructured(report), "the JSON says it all"
    assert report["arguments"]["sparsity_target"] == [0.5]
    assert {"torch", "python", "device", "threads", "precision"} <= report["environment"].keys()
    assert [epoch["epoch"] for epoch in run["pruned"]["history"]] == [1, 2]


def test_a_run_that_is_stopped_twice_ends_as_the_one_that_was_not(stop_script, fork_script, tmp_path, mnist):
    short, unbroken = f"-m benchmarks.short {SCRIPT}", tmp_path / "unbroken"
    process = fork_script(short, *QUICK, "--results_dir", unbroken)
    assert process.communicate()[1] == ""
    tmp_path = tmp_path / "stopped"
    trainings, flags = tmp_path / ".unstructured_mnist" / "trainings", (*QUICK, "--results_dir", tmp_path)
    status, message = stop_script(signal.SIGINT, trainings / "seed 0 dense.pt", short, *flags)
    assert status == 130
    assert message.endswith(f"--results_dir {tmp_path} --resume\n")
    assert len(message.splitlines()) == 1
    process = fork_script(short, *flags, "--resume", "--batch_size", 100)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors == "short.py: --resume: the stopped run was not the same: --batch_size was 128\n"
    flags = (*flags, "--resume")
    status, _ = stop_script(signal.SIGKILL, trainings / "seed 0 magnitude at 0.5.pt", short, *flags)
    assert status == -signal.SIGKILL
    process = fork_script(short, *flags)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    images = mnist.normalize(mnist.test_images[:5])
    assert results_of(tmp_path, images) == results_of(unbroken, images)


def limit_files():
    """To fewer bytes than the dense training's checkpoint and that of the masks take together."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_600_000, 3_600_000))


def test_a_file_that_cannot_be_written_ends_the_run_and_leaves_the_checkpoint_before_it(fork_script, tmp_path):
    flags = ("--train_size", 500, "--epochs", 2, "--results_dir", tmp_path)
    process = fork_script(SCRIPT, *flags, prepare=limit_files)
    printed, errors = process.communicate()
    trainings = tmp_path / ".unstructured_mnist" / "trainings"
    assert process.returncode == 1
    assert all(": epoch " in line for line in printed.splitlines()), "and no result"
    assert errors == f"unstructured_pruning.py: {trainings / 'seed 0 magnitude at 0.5.pt'}: File too large\n"
    assert {path.name for path in trainings.iterdir()} == {"seed 0 dense.pt"}
    assert len(Checkpoint(trainings / "seed 0 dense.pt").load()["history"]) == 2


def test_a_network_of_few_weights_is_drawn(in_process, tmp_path):
    printed, report = in_process(SCRIPT, "--train_size", 500, "--epochs", 1, "--sparsity_target", 0.99)
    assert report["runs"][0]["pruned"]["nonzero_weights"] == 4305
    told = f"written to {tmp_path}: unstructured_mnist.pt, unstructured_mnist.pt2, unstructured_mnist_network.png"
    assert printed.splitlines().count(told) == 1
    assert (tmp_path / "unstructured_mnist_network.png").read_bytes().startswith(b"\x89PNG")


def test_every_flag_is_alive(in_process, tmp_path):
    _, report = in_process(
        SCRIPT,
        *("--sparsity_target", 0.9, "--initial_sparsity", 0.1, "--begin_epoch", 0.5, "--end_epoch", 1.5),
        *("--frequency", 5, "--power", 2, "--scope", "lamp", "--epochs", 2, "--batch_size", 64),
        *("--method", "obd", "--label_smoothing", 0, "--shift_pixels", 1),
        *("--train_size", 1500, "--seed", 3, "--precision", "float32", "--checkpoint_every", 0),
    )
    (run,) = report["runs"]
    updates = run["pruned"]["mask_updates"]  # 1500 examples are 24 steps of 64
    assert [update["step"] for update in updates] == [12, 17, 22, 27, 32, 36]
    planned = [0.9 - 0.8 * (1 - (step - 12) / 24) ** 2 for step in (12, 17, 22, 27, 32, 36)]
    assert [update["planned"] for update in updates] == pytest.approx(planned)
    assert [update["actual"] for update in updates] == [round(430_500 * value) / 430_500 for value in planned]
    assert run["seed"] == 3
    assert sparsity(load_model(tmp_path / "unstructured_mnist.pt", MnistCNN)) == 387_450 / 430_500
    layers = {layer["layer"]: layer["nonzero"] / layer["weights"] for layer in run["pruned"]["layers"]}
    assert layers["conv1.weight"] > 0.3 > layers["fc1.weight"], "layer-adaptive scores spare the small layer"


SMALL = ("--train_size", 500, "--batch_size", 50, "--epochs", 2)


def test_the_dense_network_teaches(in_process):
    """With nothing pruned all else is as in `test_sweep_shares_one_dense_network_per_seed`, but for the labels."""
    _, alone = in_process(SCRIPT, *SMALL, "--sparsity_target", 0)
    _, taught = in_process(SCRIPT, *SMALL, "--sparsity_target", 0, "--distill", 0.9)
    assert comparable(taught["runs"][0]["dense"]) == comparable(alone["runs"][0]["dense"])
    assert comparable(alone["runs"][0]["pruned"]["history"]) == comparable(alone["runs"][0]["dense"]["history"])
    assert comparable(taught["runs"][0]["pruned"]["history"]) != comparable(taught["runs"][0]["dense"]["history"])


def test_sweep_shares_one_dense_network_per_seed(in_process, tmp_path):
    _, report = in_process(SCRIPT, *SMALL, "--seed", 0)
    (alone,) = comparable(report["runs"])
    for path in tmp_path.iterdir():
        path.unlink()
    printed, sweep = in_process(SCRIPT, *SMALL, "--sparsity_target", 0, 0.5, "--seed", 0, 1)
    assert {path.name for path in tmp_path.iterdir()} == {
        "unstructured_mnist_sweep.json",
        "unstructured_mnist_sweep.png",
    }
    runs = comparable(sweep["runs"])
    assert [(run["seed"], run["sparsity_target"]) for run in runs] == [(0, 0), (0, 0.5), (1, 0), (1, 0.5)]
    assert runs[0]["pruned"]["history"] == runs[0]["dense"]["history"], "pruning is the only difference"
    assert runs[0]["drop"] == 0
    assert runs[1] == alone, "a run is a sweep of length one"
    assert sweep.keys() == report.keys()
    assert (tmp_path / "unstructured_mnist_sweep.png").read_bytes() == plots.unstructured_sweep(sweep)
    accuracies = [runs[1]["pruned"]["test_accuracy"], runs[3]["pruned"]["test_accuracy"]]
    point = sweep["summary"]["pruned"][1]
    assert point["test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert point["test_accuracy"]["std"] == pytest.approx(statistics.stdev(accuracies))
    assert f"{sum(accuracies) / 2:.2f} ± {statistics.stdev(accuracies):.2f}" in printed
    assert "run seed 1 magnitude at 0.5: done, 4 of 4" in printed


def test_methods_and_controls_side_by_side(in_process, tmp_path):
    flags = (*SMALL, "--sparsity_target", 0.9, "--method", "layerwise_random", "magnitude", "--controls")
    printed, sweep = in_process(SCRIPT, *flags)
    assert [run["method"] for run in sweep["runs"]] == ["layerwise_random", "magnitude"]
    at_random, magnitude = (run["pruned"] for run in sweep["runs"])
    assert at_random["layers"] == magnitude["layers"], "as many of each layer"
    assert at_random["history"] != magnitude["history"]
    assert "magnitude, 90 %" in printed
    assert "layerwise_random, 90 %" in printed
    scratch, point = sweep["runs"][0]["scratch"], sweep["summary"]["pruned"][0]
    assert scratch["layers"] == at_random["layers"], "the same masks"
    assert scratch["nonzero_weights"] == 43_050
    assert scratch["history"] != at_random["history"]
    assert point["scratch_accuracy"]["mean"] == scratch["test_accuracy"]
    assert "scratch" not in sweep["runs"][1], "it is a control of the first method"
    assert (tmp_path / "unstructured_mnist_sweep.png").read_bytes() == plots.unstructured_sweep(sweep)


def test_a_lottery_ticket_begins_where_the_dense_network_did_and_scratch_elsewhere(in_process):
    """With nothing pruned the ticket's training is the dense one."""
    _, report = in_process(SCRIPT, *SMALL, "--sparsity_target", 0, "--controls")
    (run,) = report["runs"]
    dense, ticket, scratch = (
        [(epoch["train_loss"], epoch["test_accuracy"]) for epoch in run[name]["history"]]
        for name in ("dense", "ticket", "scratch")
    )
    assert ticket == dense
    assert scratch != dense


def test_layerwise_random_in_a_pattern(in_process):
    _, sweep = in_process(SCRIPT, *SMALL, "--scope", "2:4", "--method", "magnitude", "layerwise_random")
    magnitude, at_random = (run["pruned"]["layers"] for run in sweep["runs"])
    assert magnitude == at_random, "the same counts in each layer; conv1 stays dense"


def test_scopes_side_by_side(in_process, tmp_path):
    printed, sweep = in_process(SCRIPT, *SMALL, "--scope", "global", "layer", "2:4")
    counts = [[layer["nonzero"] for layer in run["pruned"]["layers"]] for run in sweep["runs"]]
    assert sum(counts[0]) == 215_250
    assert counts[1:] == [[250, 12_500, 200_000, 2_500], [500, 12_500, 200_000, 2_500]]
    assert [run["scope"] for run in sweep["runs"]] == ["global", "layer", "2:4"]
    assert "magnitude, 2:4, 50 %" in printed
    assert (tmp_path / "unstructured_mnist_sweep.png").read_bytes() == plots.unstructured_sweep(sweep)


def test_every_method_and_scope_of_the_technique_is_offered(run_script):
    text = "".join(run_script(SCRIPT, "--help").stdout.split())
    assert "--method{" + ",".join([*METHODS, "layerwise_random"]) + "}" in text
    assert "--scope{" + ",".join([*SCOPES, "N:M"]) + "}" in text


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
        (["--held_out"], ["--held_out", "--train_size up to 59744"]),
        (["--seed", "0", "1", "0"], ["--seed 0 1 0", "each value once"]),
        (["--sparsity_target", "0.5", "0.50"], ["--sparsity_target 0.5 0.5", "each value once"]),
        (["--seed", "-1"], ["--seed", "'-1'", "at least 0"]),
        (["--scope", "row"], ["--scope", "'row'", "lamp"]),
        (["--scope", "4:2"], ["--scope", "'4:2'", "2:4"]),
        (["--scope", "1:3", "--sparsity_target", "0.7"], ["--scope 1:3", "divides one of 1, 20, 800, 500 inputs"]),
        (["--scope", "1:4"], ["--scope 1:4", "--sparsity_target of at least 0.75"]),
        (["--device", "tpu"], ["--device", "'tpu'", "cuda"]),
        (["--results_dir", "README.md/results"], ["--results_dir", "README.md/results", "writable"]),
        (["--precision", "float16"], ["--precision", "'float16'", "bfloat16"]),
        (["--resume"], ["--resume", "no stopped run"]),
        (["--data_dir", "README.md/data"], ["--data_dir: README.md/data", "README.md is a file"]),
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
    report = json.loads((folder / "unstructured_mnist.json").read_text())
    assert sparsity(load_model(folder / "unstructured_mnist.pt", MnistCNN)) == 387_450 / 430_500
    assert report["runs"][0]["pruned"]["test_accuracy"] > 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(assert_refused):
    assert_refused(SCRIPT, ["--device", "cuda"], ["--device cuda", "no CUDA device"])
