import argparse

import pytest

from experiment.data import DataError
from experiment.flags import number, run
from experiment.training import Diverged


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("0.999", 0.999), ("5e-1", 0.5)])
def test_number_accepts_its_range(text, value):
    assert number(float, 0, 1, below=True)(text) == value


@pytest.mark.parametrize("text", ["1", "-1e-9", "nan", "inf", "-inf", "", "0,5", "1e999"])
def test_number_refuses_all_else(text):
    with pytest.raises(argparse.ArgumentTypeError, match="allowed: a number of at least 0 and below 1"):
        number(float, 0, 1, below=True)(text)


@pytest.mark.parametrize("text", ["0", "1.0", "1e3", "101", "²"])
def test_whole_numbers_are_whole(text):
    with pytest.raises(argparse.ArgumentTypeError, match="allowed: a whole number of at least 1 and at most 100"):
        number(int, 1, 100)(text)


@pytest.mark.parametrize(
    "error", [DataError("data: no route"), Diverged("epoch 3"), OSError(28, "No space left on device")]
)
def test_failures_outside_our_power_end_in_one_line(error):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert str(error) in str(caught.value.code), "a string as exit code is printed, and the code is 1"


def test_ctrl_c_ends_with_130():
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 130
