"""--held_out: a recipe is chosen on training examples, not on the test set."""

import pytest

from experiment import data

SCRIPTS = {
    "unstructured_pruning.py": ("load_mnist", ()),
    "structured_pruning.py": ("load_cifar10", ("--fine_tune_epochs", 1, "--pruning_threshold", 1.0)),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_examples_left_out_of_training_take_the_test_sets_place(script, in_process, monkeypatch):
    load, flags = SCRIPTS[script]
    few = getattr(data, load)(None).first(150)
    monkeypatch.setattr(data, load, lambda folder: few)
    printed, report = in_process(script, "--train_size", 100, "--batch_size", 50, "--epochs", 1, "--held_out", *flags)
    assert "held-out accuracy (%)" in printed
    assert "test accuracy" not in printed
    for network in ("dense", "pruned"):
        assert report["runs"][0][network]["test_accuracy"] % 2 == 0, "of 50 examples, not of 64"
