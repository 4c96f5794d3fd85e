"""A run that is stopped after any of the files that it writes and resumed leaves the files of the unbroken run."""

import shutil

import pytest

from experiment import checkpoints, run
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
ALIKE = {"settings.pt", "structured_cifar.pt", "structured_cifar.pt2"}  # a stop there is as one at the next file


@pytest.mark.parametrize("script", RUNS)
def test_stopped_after_each_file(in_process, tmp_path, monkeypatch, script, mnist, cifar10):
    """The files are a checkpoint for each epoch of each training, soft targets, the record, networks, JSON, figure."""
    data = mnist if script == "unstructured_pruning.py" else cifar10
    images = data.normalize(data.test_images[:3])
    written, stop_after = [], None

    def write_whole(path, content):
        write(path, content)
        written.append(path.name)
        if len(written) == stop_after:
            raise KeyboardInterrupt

    write = checkpoints.write_whole
    monkeypatch.setattr(checkpoints, "write_whole", write_whole)
    monkeypatch.setattr(run, "write_whole", write_whole)
    in_process(script, *RUNS[script])
    unbroken, names = results_of(tmp_path, images), list(written)
    for stop_after in range(1, len(names)):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            in_process(script, *RUNS[script])
        stop_after = None
        in_process(script, *RUNS[script], "--resume")
        assert results_of(tmp_path, images) == unbroken
    trainings = {"seed 0 dense.pt", "seed 0 soft targets.pt"} if data is cifar10 else {"seed 0 dense.pt"}
    assert trainings <= set(names)
