import subprocess
import sys
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

    def run(script, *arguments):
        command = [sys.executable, script, "--data_dir", data_dir, *arguments]
        return subprocess.run(map(str, command), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    return run
