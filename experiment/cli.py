"""Command-line flags that mean the same in both scripts, and errors of one line.

Nothing here imports torch, which takes seconds: --help and a wrong flag are answered before that.
"""

import argparse
import hashlib
import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

LEAST_HELD_OUT = 256  # examples; as many are the batch whose time is measured
REQUIREMENTS = {"torch", "torchvision", "numpy", "matplotlib", "tqdm"}


class Failure(Exception):
    """An error that the user can mend; the message, one line, says what was wrong and what is allowed."""


class UsageError(Failure):
    """A flag asks for what cannot be had here; the message names the flag. Ends a script with exit code 2."""


class DataError(Failure):
    """A data set cannot be fetched or read; the message names the file."""


class CheckpointError(Failure):
    """A file is not the checkpoint that it should be; the message names it."""


class Diverged(Failure):
    """The training loss is not finite; the message says when."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C in a run that --resume can continue."""


class DefaultsHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Prints each flag's default as it would be typed; where that is None the help itself says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default: " in action.help:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with every default in --help, no abbreviations, and errors of one line instead of the usage."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=DefaultsHelp, allow_abbrev=False)
        self.train_size = 0  # of the whole training set, once there are flags for it

    def parse_args(self) -> argparse.Namespace:
        args = super().parse_args()
        for name, values in vars(args).items():
            if isinstance(values, list) and len(set(values)) < len(values):
                self.error(f"--{name} {' '.join(map(str, values))}: allowed: each value once")
        most = self.train_size - LEAST_HELD_OUT
        if self.train_size and args.held_out and args.train_size > most:
            left_out = self.train_size - args.train_size
            self.error(f"--held_out: {left_out} training examples are left out; allowed: --train_size up to {most}")
        return args

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n" if is_first_process() else None)


def is_first_process() -> bool:
    """True but for all processes of torchrun on this machine except one, which speaks for all."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def launched() -> int:
    """How many processes torchrun has started; 1 without it, also where something else has set WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Callable:
    """An argparse type: a finite int or float from `low` (or `above` it) to `high` (or `below` it)."""
    allowed = f"a {'whole ' if kind is int else ''}number {'above' if above else 'of at least'} {low}"
    if high < math.inf:
        allowed += f" and {'below' if below else 'at most'} {high}"

    def parse(text: str) -> float:
        try:
            value, is_finite = kind(text), math.isfinite(float(text))
        except ValueError:
            value, is_finite = math.nan, False
        if not (is_finite and low <= value <= high) or (above and value == low) or (below and value == high):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: {allowed}")
        return value

    return parse


@dataclass(frozen=True)
class Options:
    """The flags of `add_shared_flags` that say where, how and with what a run is made, whatever its experiment."""

    batch_size: int
    train_size: int
    held_out: bool
    device: str
    precision: str
    deterministic: bool
    data_dir: Path
    results_dir: Path
    checkpoint_every: int
    resume: bool | None  # None: neither --resume nor --no-resume was given

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Options":
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def add_shared_flags(parser: Parser, *, epochs: int, batch_size: int, train_size: int) -> None:
    """The flags that both experiments have; `train_size` is the size of the whole training set."""
    parser.train_size = train_size
    parser.add_argument("--epochs", type=number(int, 1, 100_000), default=epochs, help="passes over the training set")
    parser.add_argument(
        "--batch_size", type=number(int, 1, train_size), default=batch_size, help="examples per optimiser step"
    )
    parser.add_argument(
        "--train_size",
        type=number(int, 1, train_size),
        default=train_size,
        help="examples to train on, the first of a fixed permutation; fewer for quick tries",
    )
    parser.add_argument(
        "--held_out",
        action="store_true",
        help="evaluate on the training examples that --train_size leaves out, not on the test set: to choose a recipe",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        nargs="+",
        default=[0],
        help="decides every random choice; one or several",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the matrix products in training; auto: bfloat16 if the device has instructions for it",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same numbers from the same seed on CUDA too, at some cost in speed; on the CPU that is always so",
    )
    add_folder_flags(parser, "results")
    parser.add_argument(
        "--checkpoint_every",
        type=number(int, 0),
        default=1,
        help="epochs from one checkpoint to the next; 0: only at the end of each training",
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="continue a stopped run that had the same arguments, or discard it",
    )


def add_choices_flag(
    parser: Parser, flag: str, choices: dict[str, str], what: str, parse: Callable[[str], str] | None = None
) -> None:
    """A flag of one or several of the `choices`, which come with their meanings; the first is the default.

    `parse`, an argparse type, says what is allowed where the choices are not all there is.
    """
    parser.add_argument(
        flag,
        nargs="+",
        default=[next(iter(choices))],
        help=f"{what}; {meanings(choices)}",
        **{"type": parse, "metavar": f"{{{','.join(choices)}}}"} if parse else {"choices": tuple(choices)},
    )


def meanings(choices: dict[str, str]) -> str:
    """Each choice with its meaning, as a help text says them."""
    return "; ".join(f"{name}: {meaning}" for name, meaning in choices.items())


def add_controls_flag(parser: Parser, controls: dict[str, str], default: str) -> None:
    """--controls, which also trains the controls that are named, without a name all; their names and meanings.

    The parsed value is the list of their names, and of `default` where the flag is not given.
    """
    parser.add_argument(
        "--controls",
        choices=(*controls, "none"),
        nargs="*",
        action=Controls,
        default=[name for name in controls if name == default],
        help=f"controls to train as well; without a value all; {meanings(controls)} (default: {default})",
    )


class Controls(argparse.Action):
    """The controls that were typed after a flag: all if there are none, no control for "none"."""

    def __call__(self, parser: Parser, args: argparse.Namespace, values: list[str], flag: str | None = None) -> None:
        if "none" in values and len(values) > 1:
            parser.error(f"{flag} {' '.join(values)}: none cannot be combined with another")
        values = values or [name for name in self.choices if name != "none"]
        setattr(args, self.dest, [name for name in values if name != "none"])


def add_folder_flags(parser: Parser, results_dir: str) -> None:
    """The flags of what reads a data set and writes into `results_dir`, unless told otherwise."""
    parser.add_argument(
        "--data_dir", type=data_folder, default=Path("data"), help="folder of the data set, downloaded if missing"
    )
    parser.add_argument("--results_dir", type=Path, default=Path(results_dir), help="folder for what the run writes")


def data_folder(text: str) -> Path:
    """An argparse type: a folder that exists or can be made."""
    for folder in (Path(text), *Path(text).parents):
        if folder.exists() and not folder.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: {folder} is a file; allowed: a new or existing folder")
    return Path(text)


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_json(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as JSON can hold them, without --resume, which makes no difference to the results."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    values.pop("resume", None)
    return values


def run(main: Callable[[], None]) -> None:
    """Call `main`; a failure ends in one line on stderr instead of a traceback.

    Exit code 2 for bad use, 130 for Ctrl-C, 1 for all else.
    """
    script = Path(sys.argv[0]).name
    try:
        main()
    except UsageError as error:
        if is_first_process():
            print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except Failure as error:
        sys.exit(f"{script}: {error}")
    except ModuleNotFoundError as error:
        if error.name not in REQUIREMENTS:
            raise
        sys.exit(f"{script}: {error.name} is not installed; to install it: pip install -r requirements.txt")
    except OSError as error:
        sys.exit(f"{script}: {error.filename}: {error.strerror}" if error.filename else f"{script}: {error}")
    except KeyboardInterrupt as error:
        kept = (argument for argument in sys.orig_argv[1:] if argument not in ("--resume", "--no-resume"))
        command = [sys.executable, *kept, "--resume"]
        again = "the same launch with --resume" if "LOCAL_RANK" in os.environ else shlex.join(command)
        offer = f"; to continue: {again}" if isinstance(error, Stopped) else ""
        if is_first_process():
            print(f"{script}: stopped{offer}", file=sys.stderr)
        sys.exit(130)
