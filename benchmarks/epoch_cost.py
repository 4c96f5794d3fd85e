"""What an epoch of MNIST costs: dense, pruned, and fed by a torchvision DataLoader.

    python -m benchmarks.epoch_cost

The same network, optimiser and batch size throughout; an epoch of each kind in turn, again and again, because on a
shared machine only what ran side by side can be compared. Writes benchmarks/results/epoch_cost.json.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from tqdm import trange

from experiment import data, flags, results
from models.mnist_cnn import MnistCNN
from pruning.schedule import PolynomialDecay
from unstructured_pruning import train

RESULTS = Path(__file__).parent / "results" / "epoch_cost.json"
BATCH_SIZE = 128


def main() -> None:
    parser = flags.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=flags.number(int, 1), default=7, help="epochs of each kind")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder for the data set, filled if empty")
    args = parser.parse_args()

    mnist = data.load_mnist(args.data_dir)
    one_epoch = argparse.Namespace(epochs=1, batch_size=BATCH_SIZE, train_size=60_000, scope="global")
    # As often as the default run prunes: every 46 of the 469 steps of an epoch.
    schedule = PolynomialDecay(begin=0, end=469, frequency=46, final_sparsity=0.5)
    kinds = {
        "dense": lambda: train(one_epoch, 0, mnist)[1]["seconds_per_epoch"],
        "pruned": lambda: train(one_epoch, 0, mnist, schedule)[1]["seconds_per_epoch"],
        "DataLoader": lambda: loader_epoch(args.data_dir, workers=0),
        "DataLoader with 2 workers": lambda: loader_epoch(args.data_dir, workers=2),
    }
    seconds = {kind: [] for kind in kinds}
    for _ in trange(args.repetitions, unit="round", disable=None):
        for kind, epoch in kinds.items():
            seconds[kind].append(epoch())

    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    against_dense = {  # round by round, so that a machine that slows down slows both
        kind: statistics.median(other / dense for other, dense in zip(values, seconds["dense"], strict=True))
        for kind, values in seconds.items()
    }
    environment = results.environment(torch.device("cpu"))
    record = {"environment": environment, "seconds": seconds, "median": median, "against_dense": against_dense}
    results.write_json(RESULTS, record)
    rows = [[kind, f"{median[kind]:.2f}", f"{against_dense[kind]:.3f}"] for kind in kinds]
    print(results.table(["an epoch", "seconds (median)", "against dense (median ratio)"], rows))


def loader_epoch(data_dir: Path, workers: int) -> float:
    """Seconds for the training script that torchvision's documentation leads to, on our network."""
    torch.manual_seed(0)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    mnist = datasets.MNIST(data_dir, transform=transform)
    loader = DataLoader(mnist, batch_size=BATCH_SIZE, shuffle=True, num_workers=workers)
    model = MnistCNN().to(memory_format=torch.channels_last)
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
