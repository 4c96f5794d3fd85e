"""What training on MNIST costs: dense, pruned, and fed by a torchvision DataLoader.

    python -m benchmarks.epoch_cost

The same network, optimiser and batch size throughout. Each kind trains on as many examples in turn, again and again
and in both orders, because on a shared machine only what ran side by side can be compared. Writes epoch_cost.json.
"""

import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms
from tqdm import trange

import unstructured_pruning
from experiment import checkpoints, cli, data, report
from experiment.data import ImageData
from experiment.training import Recipe, fit, initial, sgd
from models.mnist_cnn import MnistCNN
from pruning.schedule import PolynomialDecay
from unstructured_pruning import Point

BATCH_SIZE = 128


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=cli.number(int, 1), default=16, help="times that each kind trains")
    parser.add_argument("--train_size", type=cli.number(int, 1, 60_000), default=20_000, help="examples per training")
    cli.add_folder_flags(parser, "benchmarks/results")
    args = parser.parse_args()

    mnist = data.load_mnist(args.data_dir).first(args.train_size)
    recipe = Recipe(epochs=1, batch_size=BATCH_SIZE, **unstructured_pruning.RECIPE)
    steps = recipe.steps(args.train_size)
    # Every 46 steps, as in the default run; not at step 0, which is before the clock starts.
    schedule = PolynomialDecay(begin=1, end=steps, frequency=min(46, max(1, steps - 1)), final_sparsity=0.5)
    point = Point(0, "magnitude", "global", schedule)
    kinds = {
        "dense": lambda: train(mnist, recipe),
        "pruned": lambda: unstructured_pruning.train_and_prune(mnist, recipe, point)[1][0]["seconds"],
        "DataLoader": lambda: loader_epoch(args.data_dir, args.train_size, torch.contiguous_format),
        "DataLoader, channels_last": lambda: loader_epoch(args.data_dir, args.train_size, torch.channels_last),
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
    environment = report.environment(torch.device("cpu"))
    record = {
        "arguments": cli.as_json(args),
        "environment": environment,
        "seconds": seconds,
        "median": median,
        "median_ratio_to_dense": {kind: statistics.median(values) for kind, values in ratios.items()},
        "ratio_to_dense": {kind: report.mean_and_std(values) for kind, values in ratios.items()},
    }
    checkpoints.write_whole(args.results_dir / "epoch_cost.json", report.json_bytes(record))
    header = [f"{args.train_size:,} examples", "median seconds", "median of the rounds' ratios to dense", "mean ± std"]
    rows = [
        [
            kind,
            f"{median[kind]:.2f}",
            f"{record['median_ratio_to_dense'][kind]:.3f}",
            report.with_std(record["ratio_to_dense"][kind]),
        ]
        for kind in kinds
    ]
    print(report.table(header, rows))


def train(mnist: ImageData, recipe: Recipe) -> float:
    """Seconds of the dense network's training."""
    model = initial(MnistCNN, 0, torch.device("cpu"))
    return fit(model, sgd(model, recipe), mnist, recipe, 0)[0]["seconds"]


def loader_epoch(data_dir: Path, train_size: int, memory_format: torch.memory_format) -> float:
    """Seconds for the training loop that torchvision's documentation leads to, on our network."""
    torch.manual_seed(0)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    mnist = Subset(datasets.MNIST(data_dir, transform=transform), range(train_size))
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
    cli.run(main)
