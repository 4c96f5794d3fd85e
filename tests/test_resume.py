"""A run that is stopped after any of the files that it writes and resumed leaves the files of the unbroken run."""

import shutil

import pytest

from experiment import checkpoints, plots
from tests.reports import results_of

RUNS = {
    "unstructured_pruning.py": (
        *("--train_size", 100, "--batch_size", 50, "--epochs", 2, "--sparsity_target", 0.9, "--distill", 0.5),
        *("--controls", "--method", "obd"),
    ),
    "structured_pruning.py": (
        *("--train_size", 40, "--batch_size", 20, "--epochs", 1, "--fine_tune_epochs", 1),
        *("--target_params", 500_000, "--controls", "longer"),
    ),
}
ALIKE = {
    "settings.pt",
    "structured_cifar.pt",
    "structured_cifar.pt2",
    "unstructured_mnist.pt",
}  # a stop there is as one at the next file


@pytest.mark.parametrize("script", RUNS)
def test_stopped_after_each_file(in_process, tmp_path, monkeypatch, script):
    """The files are a checkpoint for each epoch of each training, soft targets, the record, networks, JSON, figure.

    What the exported program holds, and when, counts here; the fault campaign runs it. Figures are drawn elsewhere.
    """
    monkeypatch.setattr(checkpoints, "exported", lambda model, images: checkpoints.saved(model.state_dict()))
    monkeypatch.setattr(plots, "unstructured", lambda report: b"")
    monkeypatch.setattr(plots, "structured", lambda report: b"")
    written, stop_after = [], None

    def write_whole(path, content):
        write(path, content)
        written.append(path.name)
        if len(written) == stop_after:
            raise KeyboardInterrupt

    write = checkpoints.write_whole
    monkeypatch.setattr(checkpoints, "write_whole", write_whole)
    in_process(script, *RUNS[script])
    unbroken, names = results_of(tmp_path), list(written)
    for stop_after in range(1, len(names)):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            in_process(script, *RUNS[script])
        stop_after = None
        in_process(script, *RUNS[script], "--resume")
        assert results_of(tmp_path) == unbroken
    expected = {"seed 0 dense.pt", "soft targets of seed 0.pt", "settings.pt"}
    if "longer" in RUNS[script]:
        expected |= {"seed 0 longer.pt", "seed 0 l2 at 500000 cutoff.pt"}
    assert expected <= set(names)
