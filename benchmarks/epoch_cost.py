"""What training on MNIST costs: dense, pruned, and fed by a torchvision DataLoader.

    python -m benchmarks.epoch_cost

The same network, optimiser and batch size throughout. Each kind trains on as many examples in turn, again and again
and in both orders, because on a shared machine only what ran side by side can be compared. Writes epoch_cost.json.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms
from tqdm import trange

from experiment import data, flags, results
from experiment.training import steps_per_epoch
from models.mnist_cnn import MnistCNN
from pruning.schedule import PolynomialDecay
from unstructured_pruning import LABEL_SMOOTHING, SHIFT_PIXELS, train, train_and_prune

BATCH_SIZE = 128


def main() -> None:
    parser = flags.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=flags.number(int, 1), default=16, help="times that each kind trains")
    parser.add_argument("--train_size", type=flags.number(int, 1, 60_000), default=20_000, help="examples per training")
    flags.add_folder_flags(parser, "benchmarks/results")
    args = parser.parse_args()

    mnist = data.load_mnist(args.data_dir).first(args.train_size)
    epoch = argparse.Namespace(
        epochs=1,
        batch_size=BATCH_SIZE,
        train_size=args.train_size,
        scope="global",
        precision="float32",
        label_smoothing=LABEL_SMOOTHING,
        shift_pixels=SHIFT_PIXELS,
        processes=1,
    )
    steps = steps_per_epoch(args.train_size, BATCH_SIZE)
    # Every 46 steps, as in the default run; not at step 0, which is before the clock starts.
    schedule = PolynomialDecay(begin=1, end=steps, frequency=min(46, max(1, steps - 1)), final_sparsity=0.5)
    kinds = {
        "dense": lambda: train(epoch, 0, mnist)[1]["seconds_per_epoch"],
        "pruned": lambda: train_and_prune(epoch, 0, mnist, "magnitude", schedule)[1]["seconds_per_epoch"],
        "DataLoader": lambda: loader_epoch(args, torch.contiguous_format),
        "DataLoader, channels_last": lambda: loader_epoch(args, torch.channels_last),
    }
    seconds = {kind: [] for kind in kinds}
    for turn in trange(args.rounds, unit="round", disable=None):
        for kind in list(kinds)[:: 1 if turn % 2 else -1]:
            seconds[kind].append(kinds[kind]())

    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    ratios = {  # round by round, so that a machine that slows down slows both
        kind: [other / dense for other, dense in zip(values, seconds["dense"], strict=True)]
        for kind, values in seconds.items()
    }
    environment = results.environment(torch.device("cpu"))
    record = {
        "arguments": flags.as_json(args),
        "environment": environment,
        "seconds": seconds,
        "median": median,
        "median_ratio_to_dense": {kind: statistics.median(values) for kind, values in ratios.items()},
        "ratio_to_dense": {kind: results.mean_and_std(values) for kind, values in ratios.items()},
    }
    results.write_whole(args.results_dir / "epoch_cost.json", results.json_bytes(record))
    header = [f"{args.train_size:,} examples", "median seconds", "median of the rounds' ratios to dense", "mean ± std"]
    rows = [
        [
            kind,
            f"{median[kind]:.2f}",
            f"{record['median_ratio_to_dense'][kind]:.3f}",
            results.with_std(record["ratio_to_dense"][kind]),
        ]
        for kind in kinds
    ]
    print(results.table(header, rows))


def loader_epoch(args: argparse.Namespace, memory_format: torch.memory_format) -> float:
    """Seconds for the training loop that torchvision's documentation leads to, on our network."""
    torch.manual_seed(0)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    mnist = Subset(datasets.MNIST(args.data_dir, transform=transform), range(args.train_size))
    loader = DataLoader(mnist, batch_size=BATCH_SIZE, shuffle=True)
    model = MnistCNN().to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    start = time.perf_counter()
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    flags.run(main)
