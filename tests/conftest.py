import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import settings

from experiment.data import load_cifar10, load_mnist

settings.register_profile("unhurried", deadline=None)  # other work on the machine is no failure
settings.load_profile("unhurried")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_dir():
    """The folder of the real data, fetched at the first use."""
    return ROOT / "data"


@pytest.fixture(scope="session")
def mnist(data_dir):
    return load_mnist(data_dir)


@pytest.fixture(scope="session")
def cifar10(data_dir):
    return load_cifar10(data_dir)


@pytest.fixture(scope="session")
def run_script(data_dir):
    """Runs a script as a person would, on the real data: run_script(name, flag, ...) -> the finished process."""
    load_mnist(data_dir)

    def run(script, *arguments, **options):
        command = map(str, [sys.executable, script, "--data_dir", data_dir, *arguments])
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options)

    return run


@pytest.fixture(scope="session")
def stop_script(data_dir):
    """Runs a script until it has written a file and stops it there: stop_script(signal, file, name, flag, ...).

    Returns its exit status and what it wrote to stderr.
    """

    def stop(signal, file, script, *arguments):
        command = [sys.executable, script, "--data_dir", data_dir, *arguments]
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while not file.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal)
        _, stderr = process.communicate(timeout=60)
        return process.returncode, stderr

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
def assert_refused(monkeypatch, tmp_path, capsys):
    """Asserts that a script refuses its flags in one line, before it has done anything at all.

    In this process: starting Python and torch a hundred times would take minutes.
    """

    def assert_refused(script, arguments, mentions):
        results_dir, data_dir = tmp_path / "results", tmp_path / "data"
        command = [script, "--data_dir", data_dir, "--results_dir", results_dir, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as exit:
            importlib.import_module(script.removesuffix(".py")).main()
        printed = capsys.readouterr()
        assert exit.value.code == 2
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1
        assert all(mention in printed.err for mention in mentions), printed.err
        assert not data_dir.exists(), "no data is fetched"
        assert not results_dir.exists()

    return assert_refused
