"""What a run needs before it begins: its device, its folders and the other processes of it."""

import argparse
import os
import shutil
import tempfile

import torch

from experiment import ranks
from experiment.errors import JournalError
from experiment.flags import Parser, as_json
from experiment.journal import Journal, open_journal
from experiment.results import environment

BYTES_PER_SEED = 100_000_000  # on disk: more than the runs of one seed write, checkpoints and all


def start(parser: Parser, args: argparse.Namespace, name: str, runs: int) -> tuple[torch.device, Journal]:
    """The device and the journal of the run `name`, which is `runs` of one seed and cut; exits with one line if not.

    An `args.device` or `args.precision` of "auto" becomes what it stands for here, and `args.processes` is how many
    train one network together.
    """
    args.processes = ranks.launched() if runs == 1 else 1  # several runs are shared out instead
    smallest = (args.train_size - 1) % args.batch_size + 1
    if smallest < args.processes:
        parser.error(f"--batch_size {args.batch_size}: the last has {smallest}; allowed: at least one for each process")
    device = choose_device(parser, args)
    check_folders(parser, args)
    ranks.join(device, args.processes)
    return device, journal(parser, args, name)


def choose_device(parser: Parser, args: argparse.Namespace) -> torch.device:
    """The device of `args.device`, under torchrun this process's own; settles `args.precision` and --deterministic."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; allowed: auto, cpu")
    device = torch.device("cpu")
    if args.device != "cpu" and torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            parser.error(
                f"--nproc_per_node of torchrun: allowed: {torch.cuda.device_count()}, one for each CUDA device"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    args.device = device.type
    if args.precision == "auto":
        args.precision = "bfloat16" if has_bfloat16(device) else "float32"
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS looks for it when it is first used
        torch.use_deterministic_algorithms(True)
    return device


def check_folders(parser: Parser, args: argparse.Namespace) -> None:
    """Exits with one line where a folder of the run cannot be had."""
    for folder in (args.data_dir, *args.data_dir.parents):
        if folder.exists() and not folder.is_dir():
            parser.error(f"--data_dir {args.data_dir}: {folder} is a file; allowed: a folder, new or old")
    if args.resume and not args.results_dir.exists():
        parser.error(f"--resume: {args.results_dir} holds no stopped run to go on with; allowed: the folder of one")
    try:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.results_dir):
            pass
    except OSError as error:
        parser.error(f"--results_dir {args.results_dir}: {error.strerror}; allowed: a writable folder")
    free, needed = shutil.disk_usage(args.results_dir).free, BYTES_PER_SEED * len(args.seed)
    if free < needed:
        parser.error(f"--results_dir {args.results_dir}: {free:,} bytes free; allowed: at least {needed:,}")


def has_bfloat16(device: torch.device) -> bool:
    """True if the device has instructions of its own for products in bfloat16; elsewhere they are slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def journal(parser: Parser, args: argparse.Namespace, name: str) -> Journal:
    """The journal of the run `name` in its results folder; exits with one line where it cannot be had."""
    arguments = {f"--{key}": value for key, value in as_json(args).items() if key not in ("data_dir", "results_dir")}
    arguments |= environment(torch.device(args.device))  # another version or number of threads may give other numbers
    folder = args.results_dir / f".{name}"
    opened = Journal(folder, args.checkpoint_every)
    if ranks.rank() == 0:
        try:
            opened = open_journal(folder, arguments, args.checkpoint_every, args.resume)
        except JournalError as error:
            parser.error(f"{'--resume' if args.resume else '--results_dir'}: {error}")
    ranks.wait()
    return opened
