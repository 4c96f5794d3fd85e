import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from experiment.cli import DataError, Diverged, Stopped, UsageError, number, run


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


def test_bad_use_ends_with_2(capsys):
    def main():
        raise UsageError("--device cuda: there is none")

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(": --device cuda: there is none\n")


@pytest.mark.parametrize("script", ["unstructured_pruning.py", "structured_pruning.py"])
@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--epochs", "0"], 2), (["--seed", "1", "1"], 2)])
def test_help_and_wrong_flags_do_not_wait_for_torch(script, arguments, code):
    program = f"""if True:
        import runpy, sys
        sys.argv = {[script, *arguments]}
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as exit:
            sys.exit("torch" if "torch" in sys.modules else exit.code)"""
    root = Path(__file__).parent.parent.parent
    process = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert process.returncode == code, process.stderr
    assert (len(process.stderr.splitlines()) == 1) == (code == 2)


def test_without_the_packages_an_error_says_how_to_install_them(tmp_path):
    """In a Python without any, as in a fresh clone."""
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-S", root / "unstructured_pruning.py", "--results_dir", tmp_path / "results"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    told = "unstructured_pruning.py: torch is not installed; to install it: pip install -r requirements.txt\n"
    assert (process.returncode, process.stderr) == (1, told)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("stopped", "offers"), [(KeyboardInterrupt, False), (Stopped, True)])
def test_ctrl_c_ends_with_130_and_offers_to_continue_what_has_begun(stopped, offers, capsys):
    def main():
        raise stopped

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 130
    assert ("--resume" in capsys.readouterr().err) == offers
