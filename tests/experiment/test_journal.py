import json
import subprocess
import sys

import pytest
import torch

from experiment.journal import Checkpoint, JournalError, open_journal
from experiment.results import CheckpointError

ARGUMENTS = {"--epochs": 3, "--seed": [0, 1]}


def test_a_finished_part_is_not_done_again(tmp_path):
    journal = open_journal(tmp_path / ".run", ARGUMENTS, every=1, resume=False)
    journal.checkpoint("part").save({"epoch": 1})
    journal.checkpoint("part from scratch").save({"epoch": 1})
    journal.checkpoint("part 2").save({"epoch": 1})
    assert journal.once("part", lambda: {"accuracy": 99.5}) == {"accuracy": 99.5}
    assert {path.name for path in journal.folder.glob("part*.pt")} == {"part, done.pt", "part 2.pt"}
    assert journal.once("part", lambda: pytest.fail("done again")) == {"accuracy": 99.5}
    journal.close()
    assert list(tmp_path.iterdir()) == []


def stopped_run(folder):
    """A process that writes a journal and ends without closing it."""
    code = """if True:
        import json, pathlib, sys
        from experiment.journal import open_journal
        journal = open_journal(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), every=1, resume=False)
        journal.once("first part", lambda: {"accuracy": 12.5})"""
    subprocess.run([sys.executable, "-c", code, folder, json.dumps(ARGUMENTS)], check=True, timeout=120)


def test_resume_takes_up_what_a_stopped_run_has_left(tmp_path):
    stopped_run(tmp_path / ".run")
    with pytest.raises(JournalError, match="--epochs was 3"):
        open_journal(tmp_path / ".run", {**ARGUMENTS, "--epochs": 4}, every=1, resume=True)
    journal = open_journal(tmp_path / ".run", ARGUMENTS, every=1, resume=True)
    assert journal.once("first part", lambda: pytest.fail("done again")) == {"accuracy": 12.5}


def test_without_resume_all_is_done_anew(tmp_path):
    stopped_run(tmp_path / ".run")
    journal = open_journal(tmp_path / ".run", ARGUMENTS, every=1, resume=False)
    assert journal.once("first part", lambda: {"accuracy": 13.0}) == {"accuracy": 13.0}


def test_a_damaged_record_is_named(tmp_path):
    stopped_run(tmp_path / ".run")
    record = tmp_path / ".run" / "first part, done.pt"
    content = record.read_bytes()
    place = content.index(b"accuracy")
    record.write_bytes(content[:place] + b"A" + content[place + 1 :])
    journal = open_journal(tmp_path / ".run", ARGUMENTS, every=1, resume=True)
    with pytest.raises(CheckpointError, match=r"first part, done\.pt: not a checkpoint .*checksum"):
        journal.once("first part", lambda: pytest.fail("done again"))


def test_what_was_being_written_when_a_run_was_killed_is_swept_up(tmp_path):
    (tmp_path / ".run.json.1234").write_bytes(b"{")
    (tmp_path / ".another.json.1234").write_bytes(b"{")
    open_journal(tmp_path / ".run", ARGUMENTS, every=1, resume=False)
    assert {path.name for path in tmp_path.iterdir()} == {".run", ".another.json.1234"}


def test_nothing_to_resume(tmp_path):
    with pytest.raises(JournalError, match="no stopped run"):
        open_journal(tmp_path / ".run", ARGUMENTS, every=1, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_are_one_too_many(tmp_path):
    first = open_journal(tmp_path / ".run", ARGUMENTS, every=1, resume=False)
    for resume in (False, True):
        with pytest.raises(JournalError, match="another run"):
            open_journal(tmp_path / ".run", ARGUMENTS, every=1, resume=resume)
    first.close()
    open_journal(tmp_path / ".run", ARGUMENTS, every=1, resume=False).close()


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
    assert not (tmp_path / "harm").exists()
