"""What an unfinished run has got done, kept on disk so that it can go on after it was stopped."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment import ranks
from experiment.errors import JournalError
from experiment.results import load_saved, saved, write_whole

try:
    import fcntl
except ImportError:  # Windows has no such lock: there, two runs into one folder are not told apart
    fcntl = None


@dataclass(frozen=True)
class Checkpoint:
    """A file with the state of one training, written every `every` epochs and at the end, 0: at the end alone."""

    path: Path
    every: int = 0

    def load(self) -> dict[str, Any] | None:
        """What `save` was given last, if anything; raises CheckpointError for a file that is something else."""
        return load_saved(self.path) if self.path.exists() else None

    def is_due(self, epoch: int, last: int) -> bool:
        """True where a checkpoint is to be written, in an epoch from 1 to `last`."""
        return epoch == last or (self.every > 0 and epoch % self.every == 0)

    def save(self, content: dict[str, Any]) -> None:
        write_whole(self.path, saved(content))


@dataclass(frozen=True)
class Journal:
    """The folder of an unfinished run: its arguments, a checkpoint of each training, the record of each finished part.

    It is there from the first moment of a run to the last, and then goes.
    """

    folder: Path
    every: int  # epochs from checkpoint to checkpoint
    handle: int | None = None  # of the lock

    def checkpoint(self, name: str) -> Checkpoint:
        return Checkpoint(self.folder / f"{name}.pt", self.every)

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record that `make()` returns, made once even if the run is stopped and resumed after it.

        With the record kept, the checkpoints of the part are no longer needed: those of its name, also "from scratch".
        """
        record = self.checkpoint(f"{name}, done")
        if not record.path.exists():
            record.save(make())
            for training in (name, f"{name} from scratch"):
                self.checkpoint(training).path.unlink(missing_ok=True)
        return record.load()

    def all_of(self, parts: dict[str, Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
        """The record of every part, by its name and what makes it; the processes of torchrun share the work."""
        ranks.share(list(parts), lambda name: self.once(name, parts[name]))
        return [self.once(name, make) for name, make in parts.items()]

    def close(self) -> None:
        """The run is done and its results are written: nothing of this is needed any more."""
        ranks.wait()
        if ranks.rank() == 0:
            shutil.rmtree(self.folder)
            unlock(self.handle)
        ranks.leave()


def open_journal(folder: Path, arguments: dict[str, Any], every: int, resume: bool) -> Journal:
    """The journal in `folder`, which no other process can open until this one ends.

    With `resume` it is that of a stopped run of the same arguments, else a new one in its place. Raises JournalError,
    and CheckpointError where what was kept is damaged.
    """
    kept = Checkpoint(folder / "arguments.pt")
    if resume and not kept.path.exists():
        raise JournalError(f"{folder.parent} holds no stopped run to go on with")
    folder.mkdir(parents=True, exist_ok=True)
    handle = lock(folder)
    for part in folder.parent.glob(f"{folder.name}*.[0-9]*"):  # of a file that was being written when a run was killed
        part.unlink()
    if resume:
        earlier = kept.load()
        different = [f"{name} was {earlier.get(name)}" for name in arguments if arguments[name] != earlier.get(name)]
        if different:
            unlock(handle)
            raise JournalError(f"the stopped run was not the same: {', '.join(different)}")
    else:
        for file in folder.glob("*.pt"):
            file.unlink()
        kept.save(arguments)
    return Journal(folder, every, handle)


def lock(folder: Path) -> int | None:
    """A handle that keeps all others from locking the same folder, until it is closed or this process ends."""
    if fcntl is None:
        return None
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise JournalError(f"another run is writing to {folder.parent}") from None
    return handle


def unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
