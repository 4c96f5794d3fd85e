"""A fault campaign: runs that are killed, command lines that are wrong, files that are damaged.

    python -m benchmarks.faults

Takes about a quarter of an hour and writes faults.json. The exit status is 1 if anything ended as it should not.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

import structured_pruning
import unstructured_pruning
from experiment import checkpoints, cli, data, download, report
from models.mnist_cnn import MnistCNN
from tests.reports import results_of

ROOT = Path(__file__).parent.parent
SHORT_RUNS = {  # of a few seconds, with every kind of file that a run keeps and leaves
    "unstructured_pruning": "--train_size 1000 --epochs 2 --sparsity_target 0.9 --distill 0.5 --controls --device cpu",
    "structured_pruning": "--train_size 100 --batch_size 50 --epochs 2 --fine_tune_epochs 2 --target_params 500000 "
    "--controls longer --device cpu",
}
WRONG_VALUES = {  # for the flags that both scripts have
    "--epochs": ["0", "-3", "1.5", "ten", "nan", "100001", ""],
    "--batch_size": ["0", "-1", "60001", "128.0", "many"],
    "--train_size": ["0", "60001", "1e3", "all"],
    "--seed": ["-1", "4294967296", "0.5", "one", "3 1 3"],
    "--device": ["gpu", "tpu", "cuda:0", ""],
    "--precision": ["float16", "32", "half"],
    "--checkpoint_every": ["-1", "0.5", "never"],
    "--results_dir": ["/dev/null/results", "/proc/results"],
    "--resume": ["yes", ""],
    "--held_out": ["yes", "--train_size 60000"],
    "": ["results", "--epoch 3", "-e 3", "--learning_rate 0.1", "0.5", "--no-seed", "--=1"],
}
WRONG_VALUES_OF = {
    "unstructured_pruning": {
        "--sparsity_target": ["1", "-0.1", "50%", "nan", "inf", "0.5 0.50", "0,5", ""],
        "--initial_sparsity": ["0.6", "1", "-1e-9", "none"],
        "--begin_epoch": ["-1", "11", "7", "1e308", "inf"],
        "--end_epoch": ["10.5", "0.5", "-2", "last"],
        "--frequency": ["0", "5000", "2.5", "-46"],
        "--power": ["0", "-3", "inf", "cubic"],
        "--scope": ["row", "Global", ""],
        "--method": ["l2", "chance", "random random"],
        "--pruning_threshold": ["0.5"],
        "--distill": ["-0.1", "1.5", "teacher"],
        "--label_smoothing": ["1", "-0.1", "none"],
        "--shift_pixels": ["28", "-1", "1.5"],
        "--controls": ["longer", "scratch scratch"],
    },
    "structured_pruning": {
        "--pruning_threshold": ["-0.1", "nan", "half", "0.3 0.3", ""],
        "--controls": ["--baseline x.pt", "--sensitivity", "yes", "longer longer", "none longer"],
        "--controls scratch": ["--sensitivity"],
        "--sensitivity": ["--seed 1 2", "--target_params 400000", "--method l1 l2"],
        "--threshold_mode": ["rank", "L2", "quantile --pruning_threshold 2", "relative --pruning_threshold 1.1"],
        "--target_params": ["0", "282", "767937", "4e5", "400000 400000", "400000 --pruning_threshold 0.5"],
        "--target_macs": ["0", "1e9", "many", "20e6 --target_params 400000"],
        "--target_latency": ["0", "1.1", "half", "0.5 --pruning_threshold 0.5"],
        "--round_to": ["0", "-8", "8.0", "two"],
        "--fine_tune_epochs": ["-1", "0.5", "100001"],
        "--method": ["magnitude", "L2", "l1 l1"],
        "--baseline": ["nothing.pt", ".", "/dev/null"],
        "--sparsity_target": ["0.5"],
    },
}
HARMLESS = ["", "--epochs 10", "--seed 5", "--batch_size 64", "--checkpoint_every 2", "--precision float32"]


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    count = cli.number(int, 0)
    parser.add_argument("--kills", type=count, default=30, help="runs to kill, half of them on CIFAR-10")
    parser.add_argument("--launches", type=count, default=20, help="launches of two processes to kill")
    parser.add_argument("--command_lines", type=count, default=200, help="wrong command lines to try")
    parser.add_argument("--files", type=count, default=50, help="files to damage")
    parser.add_argument("--seed", type=count, default=0, help="decides every moment, flag and byte")
    cli.add_folder_flags(parser, "benchmarks/results")
    args = parser.parse_args()

    chance = random.Random(args.seed)
    # The command lines come first: once torch has computed on several threads, a fork of this process cannot.
    campaign = {"command_lines": tally(wrong_command_lines(args.command_lines, chance), args.command_lines)}
    data.load_mnist(args.data_dir)
    data.load_cifar10(args.data_dir)
    campaign |= {
        "files": tally(damaged_files(args.files, args.data_dir, chance), args.files),
        "killed": tally(kill_runs(args.kills, args.data_dir.resolve(), chance, False), args.kills),
        "killed_under_torchrun": tally(kill_runs(args.launches, args.data_dir.resolve(), chance, True), args.launches),
    }
    record = {"arguments": cli.as_json(args), "environment": report.environment(torch.device("cpu")), **campaign}
    print(checkpoints.write_all(args.results_dir, {"faults.json": report.json_bytes(record)}))
    if failures := [failure for part in campaign.values() for failure in part["failures"]]:
        sys.exit("\n".join(failures))


def tally(outcomes: Iterator[tuple[str, str]], tries: int) -> dict:
    """Run a part of the campaign; each outcome is in a few words what happened, and what was wrong with it, if any."""
    counts, failures = Counter(), []
    for outcome, failure in tqdm(outcomes, total=tries, unit="try", disable=None):
        counts[outcome] += 1
        failures += [failure] if failure else []
    for outcome, number in sorted(counts.items()):
        print(f"{number:4} {outcome}")
    return {"tries": tries, "outcomes": dict(sorted(counts.items())), "failures": failures}


def kill_runs(tries: int, data_dir: Path, chance: random.Random, launcher: bool) -> Iterator[tuple[str, str]]:
    """Kill runs at any moment, resume them, and compare what they leave to what the unbroken run left.

    With the `launcher` torchrun's two processes, in turn one of them or all at once. They train one network together,
    or split the runs of a sweep.
    """
    unbroken, seconds = {}, {}
    for number in range(tries):
        script, jobs = list(SHORT_RUNS)[number % 2], 1 + (number // 2) % 2 * launcher
        start = partial(start_run, script, jobs, data_dir, launcher)
        if (script, jobs) not in unbroken:
            with tempfile.TemporaryDirectory() as folder:
                process = start(folder)
                begin = wait_for_begin(process, folder)
                finish(process)
                seconds[script, jobs] = time.monotonic() - begin
                unbroken[script, jobs] = left_by(script, data_dir, folder)
        with tempfile.TemporaryDirectory() as folder:
            process = start(folder)
            wait_for_begin(process, folder)
            moment = chance.uniform(0, seconds[script, jobs])
            time.sleep(moment)
            whom = kill(process, folder, launcher and number % 4 < 2)
            resumable = any(Path(folder).glob(".*/settings.pt"))
            try:
                finish(start(folder, *(["--resume"] if resumable else [])))
                same = left_by(script, data_dir, folder) == unbroken[script, jobs]
                failure = "" if same else "other files than the unbroken run"
            except subprocess.CalledProcessError as error:
                failure = error.stderr
        outcome = "resumed" if resumable else "had finished, or begun nothing"
        complaint = f"{script}, {whom}, after {moment:.2f} s, {outcome}: {failure}"
        yield f"{script}: {whom}, {outcome}", complaint if failure else ""


def start_run(script: str, jobs: int, data_dir: Path, launcher: bool, folder: str, *more: str) -> subprocess.Popen[str]:
    """A short run of a script in a process group of its own; of several jobs it is a sweep over as many seeds."""
    seeds = ["--seed", *map(str, range(jobs))]
    flags = [*SHORT_RUNS[script].split(), *seeds, "--data_dir", str(data_dir), "--results_dir", folder, *more]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if launcher else []
    command = [sys.executable, *torchrun, "-m", "benchmarks.short", f"{script}.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same number with and without torchrun
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def wait_for_begin(process: subprocess.Popen[str], folder: str) -> float:
    """The moment at which the run has begun: it has locked its hidden folder."""
    while not any(Path(folder).glob(".*/settings.pt")):
        if process.poll() is not None:
            finish(process)
        time.sleep(0.005)
    return time.monotonic()


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for the end of a process. Raises CalledProcessError unless it is a success."""
    _, errors = process.communicate(timeout=600)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)


def kill(process: subprocess.Popen[str], folder: str, one_rank: bool) -> str:
    """Kill all processes of a run, or rank 1 alone, which ends the launch; returns which."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            is_ours = folder.encode() in (path / "cmdline").read_bytes()  # torchrun puts each into a group of its own
            if is_ours and (not one_rank or b"\0RANK=1\0" in (path / "environ").read_bytes()):
                os.kill(int(path.name), signal.SIGKILL)
    process.communicate(timeout=600)
    return "one rank killed" if one_rank else "killed"


def left_by(script: str, data_dir: Path, folder: str) -> dict:
    """The files of a finished run, as far as two runs must agree on them: the exported program's outputs, too."""
    images = load_test_images(script, data_dir)
    return results_of(folder, images)


@cache
def load_test_images(script: str, data_dir: Path) -> torch.Tensor:
    whole = data.load_mnist(data_dir) if script == "unstructured_pruning" else data.load_cifar10(data_dir)
    return whole.normalize(whole.test_images[:5])


def wrong_command_lines(tries: int, chance: random.Random) -> Iterator[tuple[str, str]]:
    """Lines with one thing wrong in them: the script must say so in one line, exit with 2 and write nothing."""
    for number in range(tries):
        module = (unstructured_pruning, structured_pruning)[number % 2]
        wrong = {**WRONG_VALUES, **WRONG_VALUES_OF[module.__name__]}
        flag = chance.choice(list(wrong))
        line = f"{chance.choice(HARMLESS)} {flag} {chance.choice(wrong[flag])}"
        with tempfile.TemporaryDirectory() as folder:
            status, printed = forked(module, line.split(), folder)
            left = os.listdir(folder)
        fine = status == 2 and printed.count("\n") == 1 and not left
        complaint = f"{module.__name__}.py {line}: exit status {status}, printed {printed!r}, left {left}"
        yield f"refused by {module.__name__}.py" if fine else "not refused", "" if fine else complaint


def forked(module: object, arguments: list[str], folder: str) -> tuple[int, str]:
    """The exit status of a script in `folder` and what it printed; in a fork, which saves starting Python and torch."""
    with tempfile.TemporaryFile(mode="w+") as output:
        if not (child := os.fork()):
            status = 1
            signal.alarm(60)  # where a line is not refused, a run begins
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.chdir(folder)
                sys.argv = [f"{module.__name__}.py", *arguments]
                cli.run(module.main)
            except SystemExit as exit:
                status = exit.code if isinstance(exit.code, int) else 1
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return status, output.read()


def damaged_files(tries: int, data_dir: Path, chance: random.Random) -> Iterator[tuple[str, str]]:
    """Damage data files and checkpoints: that must be found out, named, and where there is a source, repaired."""
    for number in range(tries):
        with tempfile.TemporaryDirectory() as folder:
            yield (damaged_data if number % 2 else damaged_checkpoint)(Path(folder), data_dir, chance)


DAMAGE = {
    "a bit turned over": lambda content, place: content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :],
    "cut short": lambda content, place: content[:place],
    "emptied": lambda content, place: b"",
    "replaced by another file": lambda content, place: Path(__file__).read_bytes(),
    "replaced by a folder": None,
}


def damage(path: Path, chance: random.Random) -> str:
    """Damage the file in some way; returns which."""
    kind, content = chance.choice(list(DAMAGE)), path.read_bytes()
    if DAMAGE[kind]:
        path.write_bytes(DAMAGE[kind](content, chance.randrange(len(content))))
    else:
        path.unlink()
        path.mkdir()
    return kind


def damaged_data(folder: Path, data_dir: Path, chance: random.Random) -> tuple[str, str]:
    """One of MNIST's files: refused where it cannot be fetched, and fetched where it can."""
    source = {name: (data_dir / download.MNIST_FOLDER / name).read_bytes() for name in download.MNIST_SHA256}
    for name, content in source.items():
        (folder / name).write_bytes(content)
    victim = folder / chance.choice(list(source))
    kind = damage(victim, chance)

    def load(sources: list) -> dict:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            return download.verified_files(folder, download.MNIST_SHA256, sources)

    try:
        load([])
        return f"data {kind}: not noticed", f"{victim.name} {kind}: not noticed"
    except cli.DataError as error:
        if victim.is_dir():
            return f"data {kind}: refused", "" if str(victim) in str(error) else f"not named in {error}"
    fetched = load([lambda scratch: source])
    whole = fetched == source and victim.read_bytes() == source[victim.name]
    return f"data {kind}: refused, then fetched again", "" if whole else f"{victim.name} {kind}: not repaired"


def damaged_checkpoint(folder: Path, data_dir: Path, chance: random.Random) -> tuple[str, str]:
    """A checkpoint, of a network or a training: refused, unless the damage has changed nothing of what it holds."""
    model, path = MnistCNN((4, 5, 6)), folder / "checkpoint.pt"
    content, load = chance.choice(
        [
            (checkpoints.network_bytes(model), lambda path: checkpoints.load_model(path, MnistCNN).state_dict()),
            (checkpoints.saved(model.state_dict()), checkpoints.load_saved),
        ]
    )
    path.write_bytes(content)
    kind = damage(path, chance)
    try:
        loaded = load(path)
    except cli.CheckpointError as error:
        fine = str(path) in str(error) and "\n" not in str(error)
        return f"checkpoint {kind}: refused", "" if fine else f"not named in one line: {error}"
    same = all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    return f"checkpoint {kind}: loads as it was", "" if same else f"checkpoint {kind}: loads as another"


if __name__ == "__main__":
    cli.run(main)
