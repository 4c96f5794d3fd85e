"""Commands in processes of their own that start at once: forked from a server that has imported what takes seconds.

    process = Forked(["unstructured_pruning.py", "--epochs", 1])
    printed, errors = process.communicate()

Nothing of this project is imported there. That the scripts start by themselves is for the tests to show that use
subprocess.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "torch.export", "torchvision", "matplotlib.figure", "tqdm"])


class Forked:
    """`python *command` from the project's folder, and as much of subprocess.Popen as the tests need.

    `prepare`, a function at the top of a module, is called there first; `environment` is added to that of here.
    """

    def __init__(
        self,
        command: Sequence[object],
        environment: dict[str, str] | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self.folder = TemporaryDirectory()
        self.written = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        for path in self.written:
            path.touch()
        arguments = (list(map(str, command)), self.written, {**os.environ, **(environment or {})}, prepare)
        self.process = SERVER.Process(target=become, args=arguments, daemon=True)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired("a forked command", timeout)
        stdout, stderr = (path.read_text() for path in self.written)
        return stdout, stderr


def exit_code_of(target: Callable[..., object], *arguments: object) -> int | None:
    """The exit status of a process that calls a function, which stands at the top of a module."""
    process = SERVER.Process(target=target, args=arguments, daemon=True)
    process.start()
    process.join(300)
    return process.exitcode


def become(
    command: list[str], written: list[Path], environment: dict[str, str], prepare: Callable[[], object] | None
) -> None:
    """Be the interpreter that runs this command."""
    for stream, path in zip((sys.stdout, sys.stderr), written, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite in the background ignores
    if "OMP_NUM_THREADS" in environment:  # torch has looked for it already
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if prepare:
        prepare()
    is_module = command[0] == "-m"
    sys.argv, sys.orig_argv = command[is_module:], [sys.executable, *command]
    if is_module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")
