"""Several processes, as torchrun starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

import structured_pruning
from experiment.checkpoints import load_saved
from experiment.cli import launched
from experiment.run import join
from experiment.training import Recipe, Task, evaluate, fit, sgd, soft_targets, with_labels
from tests.processes import ROOT, SERVER
from tests.reports import comparable

QUICK = ("--train_size", 1000, "--epochs", 1, "--device", "cpu", "--precision", "float32")
SWEEP = ("unstructured_pruning.py", *QUICK, "--sparsity_target", 0.5, 0.9, "--seed", 0, 1)


@pytest.fixture(scope="module")
def launch(data_dir, mnist):
    """Starts a short run in two processes of one thread each by torchrun: launch(folder, script, flag, ...)."""

    def launch(folder, script, *arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "benchmarks.short", script, "--data_dir", data_dir, "--results_dir", folder, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **pipes)

    return launch


@pytest.fixture(scope="module")
def report(fork_script, tmp_path_factory):
    """What a script leaves that must succeed: report(processes, script, flag, ...) -> (printed, JSON).

    The processes have the environment that torchrun gives them; `launch` shows that torchrun does.
    """

    def report(processes, script, *arguments, folder=None):
        folder, rendezvous = folder or tmp_path_factory.mktemp("results"), meeting_place()
        ranks = [
            fork_script(
                f"-m benchmarks.short {script}",
                *("--results_dir", folder, *arguments),
                environment={"OMP_NUM_THREADS": "1", **(rank_of(rank, processes, rendezvous) if processes > 1 else {})},
            )
            for rank in range(processes)
        ]
        printed = ""
        for rank in ranks:
            output, errors = rank.communicate()
            assert rank.returncode == 0, errors
            assert errors == "", "no warnings"
            printed += output
        (written,) = folder.glob("*.json")
        return printed, json.loads(written.read_text())

    return report


def meeting_place():
    """Where processes meet, as the environment tells them."""
    with socket.create_server(("localhost", 0)) as free:
        return {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}


def rank_of(rank, processes, rendezvous):
    """The environment of one of several processes."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), **rendezvous}


@pytest.fixture(scope="module")
def alone(report):
    """The sweep in one process."""
    return report(1, *SWEEP)


def test_a_sweep_in_two_processes_is_that_of_one(alone, report):
    printed, by_two = report(2, *SWEEP)
    assert comparable(by_two) == comparable(alone[1])
    assert len(printed.splitlines()) == len(alone[0].splitlines()), "rank 0 alone speaks"


def test_a_launch_in_which_a_process_dies_ends_and_can_be_resumed(alone, launch, report, tmp_path):
    process = launch(tmp_path, *SWEEP)
    while not list(tmp_path.glob(".unstructured_mnist/records/*.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = (int(pid) for pid in children if "\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_text())
    os.kill(second, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank      : 1" in errors
    assert f"Signal {signal.SIGKILL.value}" in errors
    kept = [load_saved(path) for path in tmp_path.glob(".unstructured_mnist/records/*.pt")]
    assert kept
    _, resumed = report(1, *SWEEP, "--resume", folder=tmp_path)
    assert all(run in resumed["runs"] for run in kept), "with the same seconds: not made again"
    assert comparable(resumed) == comparable(alone[1])


def test_a_run_in_two_processes_takes_the_steps_of_one(report):
    """LeNet-5 has no BatchNorm: but for the order of additions the two runs are the same."""
    # 262 = 6 * 41 + 16: so few steps that the rounding of the additions has not grown yet, as it does by step 25.
    command = ("unstructured_pruning.py", *QUICK, "--train_size", 262, "--sparsity_target", 0.9, "--batch_size", 41)
    runs = report(1, *command)[1], report(2, *command)[1]
    assert [run["environment"]["processes"] for run in runs] == [1, 2]
    alone, by_two = (report["runs"][0] for report in runs)
    for layer, same in zip(by_two["pruned"]["layers"], alone["pruned"]["layers"], strict=True):
        assert layer["nonzero"] == pytest.approx(same["nonzero"], rel=0.01), layer["layer"]
    for network in ("dense", "pruned"):
        losses = [run[network]["history"][0]["train_loss"] for run in (alone, by_two)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert abs(by_two[network]["test_accuracy"] - alone[network]["test_accuracy"]) < 1


def trained(data, processes):
    """A small network after three epochs of batches of 30 and a last one of 11, and its history."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10))
    recipe = Recipe(epochs=3, batch_size=30, learning_rate=0.1, warm_up=0.3, label_smoothing=0.1, shift_pixels=2)
    return model, fit(model, sgd(model, recipe), data, recipe, 5, task=Task(processes=processes))


def together(processes, work, *arguments):
    """Runs work(processes, *arguments) in as many processes that have met; its results by rank."""
    rendezvous = meeting_place()
    with TemporaryDirectory() as folder:
        ranks = [
            SERVER.Process(target=meet, args=(rank_of(rank, processes, rendezvous), processes, folder, work, arguments))
            for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(300)
            assert rank.exitcode == 0
        return [load_saved(Path(folder, f"{rank}.pt")) for rank in range(processes)]


def meet(environment, processes, folder, work, arguments):
    os.environ |= environment
    torch.set_num_threads(1)
    join(torch.device("cpu"), processes)
    torch.save(work(processes, *arguments), Path(folder, f"{environment['RANK']}.pt"))
    torch.distributed.destroy_process_group()


def train_together(processes, data):
    model, history = trained(data, processes)
    return model.state_dict(), history, evaluate(model, data)


def test_all_processes_hold_the_same_network(mnist):
    """11 examples among three processes: the parts are unequal, yet every example counts the same."""
    data = replace(mnist.first(101), test_images=mnist.test_images[:301], test_labels=mnist.test_labels[:301])
    model, history = trained(data, 1)
    held = together(3, train_together, data)
    for state, shared_history, accuracy in held:
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], held[0][0][name])
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
        for epoch, alone in zip(shared_history, history, strict=True):
            assert epoch["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)
            assert epoch["test_accuracy"] == pytest.approx(alone["test_accuracy"], abs=1)
        assert accuracy == shared_history[-1]["test_accuracy"]


def prune_together(processes, data):
    recipe, task = Recipe(epochs=1, batch_size=25, **structured_pruning.RECIPE), Task(processes=processes)
    model = structured_pruning.untrained(data, 0)
    fit(model, sgd(model, recipe), data, recipe, 0, task=task)
    point = structured_pruning.Point(0, "l2", structured_pruning.Cutoff("target_params", 380_528))
    decided = structured_pruning.choose_filters(model, data, point)
    narrow = structured_pruning.remove(model, data, decided["marked"])
    labels = soft_targets(data, model, structured_pruning.TEACHER_WEIGHT, mirror=True)
    pruned, _ = structured_pruning.fine_tune(narrow, with_labels(data, labels), recipe, 0, task)
    return pruned.state_dict(), decided["record"]["layers"]


def test_all_processes_prune_the_same_filters(cifar10):
    """Each has seen other examples, and so has its BatchNorm."""
    data = replace(cifar10.first(100), test_images=cifar10.test_images[:21], test_labels=cifar10.test_labels[:21])
    (first, layers), (second, same) = together(2, prune_together, data)
    assert layers == same
    assert any(layer["kept"] < layer["filters"] for layer in layers)
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_a_batch_with_nothing_for_a_process_is_refused(monkeypatch, assert_refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert_refused(
        "unstructured_pruning.py",
        ["--train_size", "1001", "--batch_size", "100"],
        ["--batch_size 100", "the last batch has 1"],
    )


def test_sensitivity_is_for_one_process(monkeypatch, assert_refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert_refused("structured_pruning.py", ["--sensitivity"], ["--sensitivity", "cannot be combined with torchrun"])


def test_without_torchrun_there_is_one_process_whatever_world_size_says(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("RANK", raising=False)
    assert launched() == 1
