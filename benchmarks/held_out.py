"""How to fine-tune a pruned network: recipes compared on training examples that are held out.

    python -m benchmarks.held_out                                     # or, as the committed one was made,
    torchrun --nproc_per_node=2 -m benchmarks.held_out

The CIFAR-10 network is trained on the first 40,000 training examples of a fixed permutation and pruned by its L2 norms;
each way to fine-tune it is evaluated on the other 10,000. The test set is not used. Writes held_out.json.
"""

import itertools
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import experiment
from experiment import cli, report
from experiment.data import ImageData
from experiment.measure import eval_mode
from experiment.training import Recipe, soft_targets, with_labels
from models.cifar_cnn import CifarCNN
from structured_pruning import (
    RECIPE,
    Cutoff,
    Point,
    Setup,
    choose_filters,
    dense_network,
    fine_tune,
    remove,
)


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--target_params", type=cli.number(int, 1), default=230_000, help="size to prune to")
    parser.add_argument(
        "--learning_rate",
        type=cli.number(float, 0),
        nargs="+",
        default=[0.06, 0.12],
        help="the highest in fine-tuning",
    )
    parser.add_argument(
        "--teacher_weight",
        type=cli.number(float, 0, 1),
        nargs="+",
        default=[0.7, 0.9],
        help="weight of the dense network's soft targets in fine-tuning",
    )
    parser.add_argument("--fine_tune_epochs", type=cli.number(int, 1), default=5, help="epochs after pruning")
    cli.add_shared_flags(parser, epochs=12, batch_size=128, train_size=50_000)
    parser.set_defaults(results_dir="benchmarks/results", train_size=40_000, held_out=True)
    args = parser.parse_args()
    ways = list(itertools.product(args.learning_rate, args.teacher_weight))
    with experiment.run.start("held_out", cli.Options.of(args), cli.as_json(args), len(ways)) as run:
        cifar = run.load(experiment.data.load_cifar10)
        recipe = Recipe(args.epochs, args.batch_size, precision=run.precision, **RECIPE)
        fine_tuning = replace(recipe, epochs=args.fine_tune_epochs)
        setup = Setup(run, cifar, recipe, fine_tuning, baseline=None, longer=False, scratch=None)
        point = Point(args.seed[0], "l2", Cutoff("target_params", args.target_params))
        run.split(args.seed[:1], partial(dense_network, setup), "dense network of seed")
        rows = run.for_each(ways, lambda way: measure(setup, point, *way))
        run.write({"held_out.json": report.json_bytes({**run.head, "ways": rows})})
        if run.rank == 0:
            print(report.table(list(rows[0]), [[f"{value:.6g}" for value in row.values()] for row in rows]))


def measure(setup: Setup, point: Point, learning_rate: float, teacher_weight: float) -> dict[str, float]:
    """The record of one way to fine-tune what pruning leaves."""
    cifar, task = setup.cifar, setup.run.task(f"{point} rate {learning_rate} teacher {teacher_weight}")
    dense, history = dense_network(setup, point.seed)
    narrow = remove(dense, cifar, choose_filters(dense, cifar, point)["marked"])
    recipe = replace(setup.fine_tuning, learning_rate=learning_rate)
    labels = setup.run.once(
        f"soft targets of weight {teacher_weight}",
        lambda: soft_targets(cifar, dense, teacher_weight, mirror=True, precision=recipe.precision),
    )
    model, epochs = fine_tune(narrow, with_labels(cifar, labels), recipe, point.seed, task)
    return {
        "learning_rate": learning_rate,
        "teacher_weight": teacher_weight,
        "parameters": experiment.measure.parameters(model),
        "dense_accuracy": history[-1]["test_accuracy"],
        "held_out_accuracy": epochs[-1]["test_accuracy"],
        "held_out_loss": loss(model, cifar),
    }


@torch.inference_mode()
def loss(model: CifarCNN, cifar: ImageData) -> float:
    """The mean cross-entropy of the held-out examples."""
    with eval_mode(model):
        logits = torch.cat([model(cifar.normalize(some)) for some in cifar.test_images.split(1000)])
    return float(F.cross_entropy(logits, cifar.test_labels))


if __name__ == "__main__":
    cli.run(main)
