import json
import os
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from experiment.checkpoints import Checkpoint
from experiment.cli import CheckpointError, Options, Stopped, UsageError
from experiment.run import start
from tests.processes import exit_code_of

ARGUMENTS = {"epochs": 3, "seed": [0, 1], "results_dir": "anywhere"}


def options(folder, resume=None):
    return Options(
        batch_size=10,
        train_size=100,
        held_out=False,
        device="cpu",
        precision="float32",
        deterministic=False,
        data_dir=Path("data"),
        results_dir=Path(folder),
        checkpoint_every=1,
        resume=resume,
    )


def run(folder, resume=None, jobs=1, **arguments):
    return start("run", options(folder, resume), {**ARGUMENTS, **arguments}, jobs)


def never():
    pytest.fail("done again")


@contextmanager
def stopped(folder, **arguments):
    """A run that is stopped when the block ends."""
    with suppress(Stopped), run(folder, **arguments) as opened:
        yield opened
        raise KeyboardInterrupt


def test_what_is_done_is_not_done_again(tmp_path):
    with run(tmp_path) as opened:
        assert opened.once("job", lambda: {"accuracy": 99.5}) == {"accuracy": 99.5}
        assert opened.once("job", never) == {"accuracy": 99.5}
        opened.task("seed 0 dense").checkpoint.save({"epoch": 1})
    assert list(tmp_path.iterdir()) == [], "nothing of a finished run is left but its results"


def test_resume_continues_what_a_stopped_run_has_left(tmp_path):
    with stopped(tmp_path) as opened:
        opened.once("job", lambda: {"labels": torch.tensor([1.5])})
        opened.task("training").checkpoint.save({"epoch": 7})
    with (
        pytest.raises(UsageError, match="--resume: the stopped run was not the same: --epochs was 3"),
        run(tmp_path, resume=True, epochs=4),
    ):
        never()
    with run(tmp_path, resume=True, results_dir="elsewhere") as opened:
        assert opened.once("job", never)["labels"].tolist() == [1.5]
        assert opened.task("training").checkpoint.load() == {"epoch": 7}


def test_a_stopped_run_is_not_lost_unless_that_is_said(tmp_path):
    with stopped(tmp_path) as opened:
        opened.once("job", lambda: {"accuracy": 12.5})
        opened.task("training").checkpoint.save({"epoch": 7})
    with pytest.raises(UsageError, match=r"--results_dir .*: holds a stopped run; allowed: --resume"), run(tmp_path):
        never()
    with pytest.raises(UsageError, match=r"holds a stopped run"), run(tmp_path, epochs=4):
        never()
    with run(tmp_path, resume=False) as opened:
        assert opened.once("job", lambda: {"accuracy": 13.0}) == {"accuracy": 13.0}
        assert opened.task("training").checkpoint.load() is None


def test_what_a_run_killed_in_its_last_moment_has_not_yet_removed_is_in_nobodys_way(tmp_path):
    """It had written its results, and was removing the hidden folder."""
    with stopped(tmp_path) as opened:
        opened.task("training").checkpoint.save({"epoch": 7})
    (tmp_path / ".run" / "settings.pt").unlink()
    with run(tmp_path) as opened:
        assert opened.task("training").checkpoint.load() is None


def killed(folder):
    with run(folder) as opened:
        opened.once("job", lambda: {"accuracy": 12.5})
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_is_killed_leaves_no_lock(tmp_path):
    assert exit_code_of(killed, tmp_path) == -signal.SIGKILL
    with run(tmp_path, resume=True) as opened:
        assert opened.once("job", never) == {"accuracy": 12.5}


def test_several_jobs_are_each_done_once(tmp_path, capsys):
    """Without a terminal each job that is done now is a line; what was kept from before says nothing."""
    with stopped(tmp_path, jobs=2) as opened:
        opened.once("first", lambda: {"accuracy": 1.0})
    with run(tmp_path, resume=True, jobs=2) as opened:
        records = opened.for_each(["first", "second"], lambda name: {"accuracy": 2.0} if name == "second" else never())
    assert records == [{"accuracy": 1.0}, {"accuracy": 2.0}]
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("run second: done, 1 of 1\n", "")


def test_with_a_terminal_a_bar_tells_how_far_a_sweep_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with run(tmp_path, jobs=3) as opened:
        opened.for_each("abc", lambda name: {})
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "3/3" in printed.err
    with run(tmp_path, jobs=1) as opened:
        opened.for_each("a", lambda name: {})
    assert capsys.readouterr() == ("", ""), "one job has the bar of its training alone"


def test_a_damaged_record_is_named(tmp_path):
    with stopped(tmp_path) as opened:
        opened.once("job", lambda: {"accuracy": 12.5})
    record = opened.record("job").path
    content = record.read_bytes()
    place = content.index(b"accuracy")
    record.write_bytes(content[:place] + b"A" + content[place + 1 :])
    with (
        pytest.raises(CheckpointError, match=r"job\.pt: not a checkpoint .*checksum"),
        run(tmp_path, resume=True) as opened,
    ):
        opened.once("job", never)


def test_what_was_being_written_when_a_run_was_killed_is_removed(tmp_path):
    (tmp_path / ".run.json.1234").write_bytes(b"{")
    (tmp_path / ".another.json.1234").write_bytes(b"{")
    with run(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".run", ".another.json.1234"}


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UsageError, match=r"--resume: .* holds no stopped run"), run(tmp_path, resume=True):
        never()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_are_one_too_many(tmp_path):
    with run(tmp_path):
        for resume, flag in ((None, "--results_dir"), (False, "--results_dir"), (True, "--resume")):
            with pytest.raises(UsageError, match=f"{flag}: another run"), run(tmp_path, resume=resume):
                never()
    with run(tmp_path):
        pass


def test_files_are_written_and_named(tmp_path, capsys):
    with run(tmp_path) as opened:
        opened.publish("results", {"accuracy": 1.5}, b"picture", "a table")
    report = json.loads((tmp_path / "results.json").read_text())
    assert report.pop("peak_memory_bytes") > 0
    assert report == {"accuracy": 1.5}
    assert (tmp_path / "results.png").read_bytes() == b"picture"
    assert capsys.readouterr().out == f"a table\nwritten to {tmp_path}: results.json, results.png\n"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.png"}


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\x03\x04 a part of a zip"])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    checkpoint = Checkpoint(tmp_path / "training.pt")
    assert checkpoint.load() is None
    checkpoint.path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"training\.pt: not a checkpoint"):
        checkpoint.load()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (tmp_path.joinpath("harm").touch, ())

    torch.save({"history": Malicious()}, tmp_path / "training.pt")
    with pytest.raises(CheckpointError, match=r"training\.pt"):
        Checkpoint(tmp_path / "training.pt").load()
    assert not os.path.exists(tmp_path / "harm")
