"""What sparse products are worth at inference, on top of compaction: LeNet-5 in PyTorch's CSR format.

    python -m benchmarks.sparse_products

LeNet-5 is pruned on MNIST by unstructured_pruning.py's recipe and compacted. Then its linear layers, or all its layers,
are multiplied as sparse matrices, the convolutions unrolled. Each computes the same; times are medians of interleaved
repetitions. Writes sparse_products.json.
"""

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unstructured_pruning
from benchmarks.weights import default_schedule
from experiment import checkpoints, cli, data, measure, report
from experiment.run import choose_precision
from experiment.training import Recipe
from models.mnist_cnn import MnistCNN
from pruning.compaction import compact
from pruning.magnitude import prunable_weights
from unstructured_pruning import Point

KINDS = ("compacted", "linear layers in CSR", "all layers in CSR")


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    fraction = cli.number(float, 0, 1, below=True)
    parser.add_argument(
        "--sparsity_target", type=fraction, nargs="+", default=[0.9, 0.98, 0.99, 0.996516], help="one or several"
    )
    parser.add_argument("--epochs", type=cli.number(int, 1), default=3, help="passes over the training set")
    parser.add_argument("--train_size", type=cli.number(int, 1, 60_000), default=60_000, help="examples to train on")
    cli.add_folder_flags(parser, "benchmarks/results")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
    cpu = torch.device("cpu")
    precision = choose_precision("auto", cpu)
    recipe = Recipe(epochs=args.epochs, batch_size=128, precision=precision, **unstructured_pruning.RECIPE)
    mnist = data.load_mnist(args.data_dir).first(args.train_size)
    images = mnist.normalize(mnist.test_images[:256])

    rows = []
    for target in args.sparsity_target:
        point = Point(0, "obd", "global", default_schedule(target, recipe.steps(args.train_size)))
        dense, *_ = unstructured_pruning.train_and_prune(mnist, recipe, point)
        rows.append({"sparsity_target": target, **timed(dense, images)})
    record = {"arguments": cli.as_json(args), "environment": report.environment(cpu), "rows": rows}
    written = checkpoints.write_all(args.results_dir, {"sparse_products.json": report.json_bytes(record)})
    cells = [
        [f"{100 * row['sparsity_target']:g} %, {batch}", *(f"{row['speed_up'][kind][batch]:.2f}" for kind in KINDS)]
        for row in rows
        for batch in row["latency_ms"]
    ]
    print(report.table(["times as fast as dense", *KINDS], cells))
    print(written)


def timed(pruned: MnistCNN, images: Tensor) -> dict[str, Any]:
    """Latencies of a pruned network, which counts as dense in its full shape, and of its kinds; their outputs agree."""
    small = compact(pruned, images[:1]).eval()
    networks = {"dense": pruned, **dict(zip(KINDS, (small, Csr(small, False), Csr(small, True)), strict=True))}
    outputs = [network(images).detach() for network in networks.values()]
    times = {f"batch {size}": measure.latency_ms(networks, images[:size]) for size in (1, 256)}
    return {
        "nonzero_weights": measure.describe_weights(prunable_weights(pruned))["nonzero_weights"],
        "largest_difference": max(float((output - outputs[0]).abs().max()) for output in outputs),
        "latency_ms": times,
        "speed_up": {
            kind: {batch: latencies["dense"] / latencies[kind] for batch, latencies in times.items()} for kind in KINDS
        },
    }


class Csr(nn.Module):
    """A compacted MnistCNN with its linear layers, or all of its layers, as sparse matrices."""

    def __init__(self, small: MnistCNN, convolutions: bool) -> None:
        super().__init__()
        self.small, self.convolutions = small, convolutions
        self.sparse = {
            name: layer.weight.detach().flatten(1).to_sparse_csr()  # (outputs, inputs * kH * kW)
            for name, layer in small.named_children()
            if convolutions or isinstance(layer, nn.Linear)
        }

    def __deepcopy__(self, memo: dict) -> "Csr":
        """Sparse tensors have no copy of their own."""
        return Csr(copy.deepcopy(self.small, memo), self.convolutions)

    def forward(self, images: Tensor) -> Tensor:
        """As MnistCNN's."""
        small, sparse = self.small, self.sparse
        if self.convolutions:  # feature maps stand as (C, N, H, W): a sparse matrix multiplies from the left
            x = F.relu(F.max_pool2d(self.unrolled("conv1", images.transpose(0, 1)), 2))  # (C, N, 12, 12)
            x = F.relu(F.max_pool2d(self.unrolled("conv2", x), 2)).transpose(0, 1)  # (N, C, 4, 4)
        else:
            x = F.relu(F.max_pool2d(small.conv1(images), 2))  # (N, C, 12, 12)
            x = F.relu(F.max_pool2d(small.conv2(x), 2))  # (N, C, 4, 4)
        x = x.flatten(1).t().contiguous()  # (C * 16, N)
        x = F.relu(sparse["fc1"] @ x + small.fc1.bias[:, None])
        return (sparse["fc2"] @ x + small.fc2.bias[:, None]).t()

    def unrolled(self, name: str, x: Tensor) -> Tensor:
        """A convolution of (C_in, N, H, W) as one product with a sparse matrix."""
        patches = x.unfold(2, 5, 1).unfold(3, 5, 1).permute(0, 4, 5, 1, 2, 3)  # (C_in, 5, 5, N, H, W)
        product = self.sparse[name] @ patches.flatten(0, 2).flatten(1)  # (C_out, N * H * W)
        return product.view(-1, *patches.shape[3:]) + self.small.get_submodule(name).bias[:, None, None, None]


if __name__ == "__main__":
    cli.run(main)
