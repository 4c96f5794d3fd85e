"""One run of a script: where it computes, which processes share it, and what it has already done.

    with start("unstructured_mnist", Options.of(args), as_json(args), jobs=6) as run:
        data = run.load(load_mnist)
        records = run.for_each([0, 1], lambda seed: {"accuracy": train(data, seed)})
        run.write({"unstructured_mnist.json": ...})

From its first moment to its last a run keeps, in a hidden folder beside its results, a checkpoint of each training and
the record of each finished job. With --resume a run that was stopped is continued from there, with --no-resume it is
discarded; without either nothing that it has done is lost.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from experiment.checkpoints import Checkpoint, write_all
from experiment.cli import Options, Stopped, UsageError, launched
from experiment.data import ImageData
from experiment.measure import peak_memory_bytes
from experiment.report import SCHEMA, environment, json_bytes
from experiment.training import Task

try:
    import fcntl
except ImportError:  # Windows has no such lock: there, two runs into one folder are not told apart
    fcntl = None

Item, Result = TypeVar("Item"), TypeVar("Result")

BYTES_PER_JOB = 25_000_000  # on disk: more than the checkpoints and records of one pruned network take


@dataclass(frozen=True)
class Run:
    """The device, the processes and the folders of a run; `start` makes it.

    Several jobs are split over the processes of torchrun; one job is shared, and then `processes` train one network.
    """

    device: torch.device
    precision: torch.dtype
    processes: int
    jobs: int
    options: Options
    kept: Path  # the hidden folder
    head: dict[str, Any]  # arguments and environment, as the report has them

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return dist.get_rank() if dist.is_initialized() else 0

    def task(self, name: str) -> Task:
        """The training of this name, for `fit`."""
        checkpoint = Checkpoint(self.kept / "trainings" / f"{name}.pt", self.options.checkpoint_every)
        return Task(name, checkpoint, self.processes, nested=self.jobs > 1)

    def once(self, name: str, make: Callable[[], Result]) -> Result:
        """What `make()` returns, made once even if the run is stopped after it and resumed; tensors are on the CPU."""
        kept = self.record(name)
        if not self.on_rank_0(kept.path.exists):
            made = make()
            if self.processes == 1 or self.rank == 0:
                kept.save(made)
            if self.processes > 1:
                dist.barrier()
        return kept.load()

    def record(self, name: str) -> Checkpoint:
        return Checkpoint(self.kept / "records" / f"{name}.pt")

    def split(self, items: Sequence[Item], do: Callable[[Item], object], unit: str) -> None:
        """Call `do(item)` for each item, split over the processes; continue when all are done.

        In a run of several jobs a bar tells how much time is left, or without a terminal one line for each item.
        """
        own = items if self.processes > 1 else items[self.rank :: self.world]
        hidden = True if self.jobs == 1 or self.rank > 0 or not own else None
        for done, item in enumerate(tqdm(own, unit=unit, disable=hidden), start=1):
            do(item)
            if self.jobs > 1 and not sys.stderr.isatty():
                print(f"{unit} {item}: done, {done} of {len(own)}", flush=True)
        self.barrier()

    def for_each(self, items: Sequence[Item], make: Callable[[Item], Result]) -> list[Result]:
        """What `make(item)` returns for each item, made once and kept by the item's name; split over the processes."""
        todo = [item for item in items if not self.record(str(item)).path.exists()]
        self.barrier()  # before anything is done, so that all processes see the same to do
        self.split(todo, lambda item: self.once(str(item), lambda: make(item)), "run")
        return [self.record(str(item)).load() for item in items]

    @property
    def world(self) -> int:
        """How many processes there are."""
        return dist.get_world_size() if dist.is_initialized() else 1

    def barrier(self) -> None:
        """Continue when all processes have come here."""
        if dist.is_initialized():
            dist.barrier()

    def on_rank_0(self, make: Callable[[], Result]) -> Result:
        """What `make()` returns; where processes share a job, rank 0 calls it and broadcasts the result."""
        if self.processes == 1:
            return make()
        made = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(made)
        return made[0]

    def load(self, read: Callable[[Path], ImageData]) -> ImageData:
        """What `read(data_dir)` returns, cut to --train_size and --held_out, on the device; rank 0 fetches it first."""
        if self.rank > 0:
            self.barrier()
        whole = read(self.options.data_dir)
        if self.rank == 0:
            self.barrier()
        return whole.first(self.options.train_size, self.options.held_out).to(self.device)

    def write(self, contents: dict[str, bytes | None]) -> None:
        """Write each content whole into the folder of results, by file name, and say so; on rank 0 only.

        None removes what an earlier run has left.
        """
        if self.rank == 0:
            print(write_all(self.options.results_dir, contents))

    def publish(self, stem: str, report: dict[str, Any], figure: bytes, text: str) -> None:
        """Print `text`, write the report, with the peak memory, and its figure."""
        if self.rank == 0:
            print(text)
        report = {**report, "peak_memory_bytes": peak_memory_bytes(self.device)}
        self.write({f"{stem}.json": json_bytes(report), f"{stem}.png": figure})


@contextlib.contextmanager
def start(name: str, options: Options, arguments: dict[str, Any], jobs: int) -> Iterator[Run]:
    """The run `name` of as many jobs, which are its points. Raises UsageError where it is not possible.

    The hidden folder is removed when the run ends, and stays where it is stopped. No other run can write into the same
    folder meanwhile.
    """
    processes = launched() if jobs == 1 else 1
    smallest = (options.train_size - 1) % options.batch_size + 1
    if smallest < processes:
        raise UsageError(
            f"--batch_size {options.batch_size}: the last batch has {smallest}; allowed: at least one example for each "
            f"of {processes} processes"
        )
    device = choose_device(options.device, options.deterministic)
    precision = choose_precision(options.precision, device)
    if options.deterministic:
        torch.use_deterministic_algorithms(True)
    check_results_dir(options, jobs)
    join(device, processes)
    precision_name = str(precision).removeprefix("torch.")
    head = {
        "arguments": arguments,
        "environment": {**environment(device), "precision": precision_name, "processes": processes},
    }
    kept = options.results_dir / f".{name}"
    run = Run(device, precision, processes, jobs, options, kept, head)
    with contextlib.ExitStack() as stack:
        if run.rank == 0:
            prepare_folder(run, options.resume, stack)
        run.barrier()
        try:
            yield run
        except KeyboardInterrupt:
            raise Stopped from None
        run.barrier()
        if run.rank == 0:
            shutil.rmtree(kept)
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(name: str, deterministic: bool = False) -> torch.device:
    """The device that --device stands for here; under torchrun each process has its own.

    Where it is to be deterministic, it must be chosen before anything is computed on it.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; allowed: auto, cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
        raise UsageError(
            f"--nproc_per_node of torchrun: allowed: {torch.cuda.device_count()}, one for each CUDA device"
        )
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS looks for it when it is first used
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The precision that --precision stands for here; auto: bfloat16 only where it is faster than float32."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return getattr(torch, name)


def has_bfloat16(device: torch.device) -> bool:
    """True if the device has instructions of its own for products in bfloat16; elsewhere they are slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def check_results_dir(options: Options, jobs: int) -> None:
    """Raise UsageError if the run cannot write there, or with --resume has nothing to continue."""
    folder = options.results_dir
    if options.resume and not folder.exists():
        raise UsageError(f"--resume: {folder} holds no stopped run; allowed: the folder of one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--results_dir {folder}: {error.strerror}; allowed: a writable folder") from error
    free, needed = shutil.disk_usage(folder).free, BYTES_PER_JOB * (jobs + 3)
    if free < needed:
        raise UsageError(f"--results_dir {folder}: {free:,} bytes free; allowed: at least {needed:,}")


def join(device: torch.device, processes: int) -> None:
    """Meet the other processes of torchrun, if there are any; `processes` of them will train one network."""
    if launched() > 1:
        forever = timedelta(days=7)  # one that dies ends the launch by torchrun; one that is slow may be waited for
        if device.type == "cuda" and processes > 1:
            dist.init_process_group("nccl", timeout=forever, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=forever)


def prepare_folder(run: Run, resume: bool | None, stack: contextlib.ExitStack) -> None:
    """Lock the hidden folder until `stack` unwinds, and empty it unless a stopped run is to be continued.

    Raises UsageError where another run has it, where --resume finds no run with the same arguments, and where what a
    stopped run has done would be lost without a word.
    """
    folder, settings = run.kept, Checkpoint(run.kept / "settings.pt")
    # What makes no difference to the results may differ. The environment tells device and precision as they are.
    free = {"data_dir", "results_dir", "checkpoint_every", "device", "precision"}
    same = {f"--{key}": value for key, value in run.head["arguments"].items() if key not in free}
    same |= run.head["environment"]  # another version or number of threads may give other numbers
    same["schema"] = SCHEMA
    if resume and not settings.path.exists():
        raise UsageError(f"--resume: {folder.parent} holds no stopped run; allowed: the folder of one")
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(folder, "--resume" if resume else "--results_dir"))
    for part in folder.parent.glob(f"{folder.name}*.[0-9]*"):  # of a file that was being written when a run was killed
        part.unlink()
    if resume:
        earlier = settings.load()
        different = [f"{name} was {earlier.get(name)}" for name in same if same[name] != earlier.get(name)]
        if different:
            raise UsageError(f"--resume: the stopped run was not the same: {', '.join(different)}")
    else:
        if resume is None and settings.path.exists() and any(folder.glob("*/*.pt")):
            raise UsageError(
                f"--results_dir {folder.parent}: holds a stopped run; allowed: --resume to continue it, --no-resume to "
                "discard it"
            )
        for path in folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        settings.save(same)


@contextlib.contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Keep all others from locking the same folder meanwhile; a lock ends with its process, however that ends."""
    if fcntl is None:
        yield
        return
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{flag}: another run is writing to {folder.parent}") from None
        yield
