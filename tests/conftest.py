import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import settings

from experiment import data, measure
from tests.processes import ROOT, Forked

settings.register_profile("unhurried", deadline=None)  # other work on the machine is no failure
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def data_dir():
    """The folder of the real data, fetched at the first use."""
    return ROOT / "data"


@pytest.fixture(scope="session")
def mnist(data_dir):
    return data.load_mnist(data_dir)


@pytest.fixture(scope="session")
def cifar10(data_dir):
    return data.load_cifar10(data_dir)


@pytest.fixture(scope="session")
def run_script(data_dir, mnist, cifar10):
    """Runs a script as a person would, on the real data: run_script(name, flag, ...) -> the finished process."""

    def run(script, *arguments, **options):
        command = [sys.executable, *script.split(), "--data_dir", data_dir, *arguments]
        return subprocess.run(
            list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options
        )

    return run


@pytest.fixture(scope="session")
def fork_script(data_dir, mnist, cifar10):
    """Starts a script that need not import torch first: fork_script(name, flag, ...) -> a `Forked` process."""

    def fork(script, *arguments, **options):
        return Forked([*script.split(), "--data_dir", data_dir, *arguments], **options)

    return fork


@pytest.fixture(scope="session")
def stop_script(fork_script):
    """Runs a script until it has written a file and stops it there: stop_script(signal, file, name, flag, ...).

    Returns its exit status and what it wrote to stderr.
    """

    def stop(signal, file, script, *arguments):
        process = fork_script(script, *arguments)
        while not file.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.kill(process.pid, signal)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    return stop


@pytest.fixture(scope="session")
def run_to_end(run_script, tmp_path_factory):
    """Runs a script that must succeed: run_to_end(name, flag, ...) -> (its folder of results, what it printed)."""

    def run(script, *arguments):
        folder = tmp_path_factory.mktemp("results")
        process = run_script(script, "--results_dir", folder, *arguments)
        assert process.returncode == 0, process.stderr
        assert process.stderr == "", "no progress bar where there is no terminal, and no warnings"
        return folder, process.stdout

    return run


@pytest.fixture
def in_process(mnist, cifar10, tmp_path, monkeypatch, capsys):
    """Runs a script in this process, evaluated on few images and without measuring latencies, which saves time.

    in_process(name, flag, ...) -> (what it printed, its one JSON); its results are in `tmp_path`.
    """
    for load, whole in (("load_mnist", mnist), ("load_cifar10", cifar10)):
        few = replace(whole, test_images=whole.test_images[:64], test_labels=whole.test_labels[:64])
        monkeypatch.setattr(data, load, lambda folder, few=few: few)
    monkeypatch.setattr(measure, "latency_ms", lambda networks, batch: dict.fromkeys(networks, 1.0))

    def in_process(script, *arguments):
        command = [script, "--results_dir", tmp_path, "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        importlib.import_module(script.removesuffix(".py")).main()
        (report,) = tmp_path.glob("*.json")
        return capsys.readouterr().out, json.loads(report.read_text())

    return in_process


@pytest.fixture
def assert_refused(monkeypatch, tmp_path, capsys):
    """Asserts that a script refuses its flags in one line, before it has done anything at all.

    In this process: starting Python and torch a hundred times would take minutes.
    """

    def assert_refused(script, arguments, mentions):
        results_dir, data_dir = tmp_path / "results", tmp_path / "data"
        command = [script, "--data_dir", data_dir, "--results_dir", results_dir, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        script = importlib.import_module(script.removesuffix(".py"))
        with pytest.raises(SystemExit) as exit:
            script.cli.run(script.main)
        printed = capsys.readouterr()
        assert exit.value.code == 2
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1
        assert all(mention in printed.err for mention in mentions), printed.err
        assert not data_dir.exists(), "no data is fetched"
        assert not results_dir.exists()

    return assert_refused
