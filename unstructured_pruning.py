"""Half of a small CNN's weights can be pruned for less than 0.1 points of accuracy: magnitude pruning on MNIST.

    python unstructured_pruning.py                              # 50 % sparsity
    python unstructured_pruning.py --sparsity_target 0.99       # one weight in a hundred is left
    python unstructured_pruning.py --sparsity_target 0.5 0.9 0.98 0.99 --seed 0 1 2

LeNet-5 is trained twice from the same initial weights, on the same examples in the same order, by the same recipe. The
second time its weights of least magnitude are set to zero while it trains, more and more of them, on the polynomial
schedule of Zhu & Gupta (2017, arXiv:1710.01878). The difference in test accuracy is the price of pruning alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import experiment
import models
import pruning
from experiment import cli

if TYPE_CHECKING:
    from torch import nn

    from experiment.data import ImageData
    from experiment.run import Run
    from experiment.training import History, Recipe, Task
    from pruning.schedule import PolynomialDecay

NAME = "unstructured_mnist"  # of the files written
FEW_WEIGHTS = 5_000  # so few can be drawn one by one
# To add one: its name here and in pruning.magnitude.METHODS, its scores in update_masks there, what it gathers during
# training, as obd does, in train_and_prune here, its colour in experiment.plots.METHODS.
METHODS = {
    "magnitude": "|w|",
    "obd": "saliency E[g^2] w^2 / 2, Optimal Brain Damage with squared gradients for the curvature",
    "random": "at random",
    "layerwise_random": "at random, with magnitude's count for each layer",
}
SCOPES = {
    "global": "all weights together",
    "layer": "those of each layer",
    "lamp": "all together, by their layer-adaptive scores",
    "N:M": "those of each layer so that of every M neighbouring inputs of a filter at most N are left, as 2:4",
}
CONTROLS = {
    "ticket": "the same initial weights trained under the final masks of the first --method",
    "scratch": "other initial weights trained under them",
}

# How every network here is trained. Chosen with 50,000 training examples, evaluated on the other 10,000. One exception:
# a learning rate of 0.2 did as well or better there; 0.1 was preferred because short runs were unstable at 0.2, which
# their test accuracy showed.
RECIPE = {
    "learning_rate": 0.1,
    "warm_up": 0.2,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "label_smoothing": 0.05,
    "shift_pixels": 2,
    "fused": True,
}


def parse_args() -> tuple[argparse.Namespace, list[PolynomialDecay]]:
    """The flags, and the schedule for each sparsity that is asked for."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add, fraction, epoch = parser.add_argument, cli.number(float, 0, 1, below=True), cli.number(float, 0)
    add("--sparsity_target", type=fraction, nargs="+", default=[0.5], help="fraction of zero weights at the end")
    add("--initial_sparsity", type=fraction, default=0.0, help="fraction of zero weights after the first mask update")
    add("--begin_epoch", type=epoch, help="time of the first mask update (default: 0.1 of --epochs)")
    add("--end_epoch", type=epoch, help="time of the last mask update (default: 0.6 of --epochs)")
    add("--frequency", type=cli.number(int, 1), help="steps between mask updates (default: a fiftieth of the span)")
    add("--power", type=cli.number(float, 0, above=True), default=3.0, help="exponent of the polynomial schedule")
    cli.add_choices_flag(parser, "--method", METHODS, "what a weight is ranked by")
    cli.add_choices_flag(parser, "--scope", SCOPES, "which weights are ranked together", parse=scope)
    add(
        "--distill",
        type=cli.number(float, 0, 1),
        default=0.0,
        help="weight of the dense network's soft targets in training the pruned one; the drop includes their gain",
    )
    add("--label_smoothing", type=fraction, default=RECIPE["label_smoothing"], help="of labels, not of soft targets")
    add("--shift_pixels", type=cli.number(int, 0, 27), default=RECIPE["shift_pixels"], help="largest random shift")
    cli.add_controls_flag(parser, CONTROLS, default="none")
    cli.add_shared_flags(parser, epochs=10, batch_size=128, train_size=60_000)
    args = parser.parse_args()
    try:
        schedules = [schedule_for(target, args) for target in args.sparsity_target]
    except ValueError as error:
        parser.error(str(error))
    for text in args.scope:
        kept, size = pruning.pattern.parse(text) or (1, 1)
        if min(args.sparsity_target) < round(1 - kept / size, 6):
            parser.error(f"--scope {text}: allowed: --sparsity_target of at least {round(1 - kept / size, 6)}")
    if "obd" in args.method and any(schedule.sparsity(0) > 0 for schedule in schedules):
        parser.error("--method obd: there is no gradient before the first step; allowed: a later --begin_epoch")
    return args, schedules


def scope(text: str) -> str:
    """A value of --scope."""
    if text not in SCOPES.keys() - {"N:M"} and not pruning.pattern.parse(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: {', '.join(SCOPES)}, N < M, as 2:4")
    return text


def schedule_for(target: float, args: argparse.Namespace) -> PolynomialDecay:
    """The flags in steps. Raises ValueError where they make no schedule that ends at `target` within the run."""
    steps = math.ceil(args.train_size / args.batch_size)  # in an epoch
    begin_epoch = 0.1 * args.epochs if args.begin_epoch is None else args.begin_epoch
    end_epoch = 0.6 * args.epochs if args.end_epoch is None else args.end_epoch
    if args.initial_sparsity > target:
        raise ValueError(f"--initial_sparsity {args.initial_sparsity}: allowed: at most --sparsity_target, {target}")
    if not begin_epoch <= end_epoch <= args.epochs:
        flags = f"--begin_epoch {begin_epoch:g} --end_epoch {end_epoch:g}"
        raise ValueError(f"{flags}: allowed: begin <= end <= {args.epochs}")
    begin, end = round(begin_epoch * steps), round(end_epoch * steps)
    if args.frequency and args.frequency > end - begin > 0:
        raise ValueError(
            f"--frequency {args.frequency}: would not prune from step {begin} to {end}; allowed: 1 to {end - begin}"
        )
    frequency = args.frequency or max(1, (end - begin) // 50)
    return pruning.schedule.PolynomialDecay(begin, end, target, args.initial_sparsity, frequency, args.power)


@dataclass(frozen=True)
class Point:
    """One network to prune: from which seed, by what, and how much at what time."""

    seed: int
    method: str
    scope: str
    schedule: PolynomialDecay

    def __str__(self) -> str:
        scope = "" if self.scope == "global" else f" {self.scope.replace(':', ' of ')}"
        return f"seed {self.seed} {self.method}{scope} at {self.schedule.final_sparsity}"


@dataclass(frozen=True)
class Setup:
    """What the points of a run have in common; `controls` are trained under the masks of the method `controlled`."""

    run: Run
    mnist: ImageData
    recipe: Recipe
    distill: float
    controls: list[str]
    controlled: str


def main() -> None:
    args, schedules = parse_args()
    check_scopes(args.scope)
    points = [Point(*point) for point in itertools.product(args.seed, args.method, args.scope, schedules)]
    with experiment.run.start(NAME, cli.Options.of(args), cli.as_json(args), len(points)) as run:
        mnist = run.load(experiment.data.load_mnist)
        recipe = experiment.training.Recipe(
            args.epochs,
            args.batch_size,
            precision=run.precision,
            **RECIPE | {"label_smoothing": args.label_smoothing, "shift_pixels": args.shift_pixels},
        )
        setup = Setup(run, mnist, recipe, args.distill, args.controls, args.method[0])

        run.split(args.seed, partial(prepare, setup), "dense network of seed")
        # First, because layerwise_random leaves as many weights in each layer as magnitude does.
        references = [replace(point, method="magnitude") for point in points if point.method == "layerwise_random"]
        run.split(references, partial(prune_reference, setup), "reference")
        runs = run.for_each(points, partial(prune_and_measure, setup))
        report, text = experiment.report.unstructured(run.head, runs)
        run.publish(f"{NAME}_sweep" if run.jobs > 1 else NAME, report, experiment.plots.unstructured(report), text)


def check_scopes(scopes: list[str]) -> None:
    """Raise UsageError for a pattern that fits no layer, before anything is trained."""
    for scope in scopes:
        model = models.mnist_cnn.MnistCNN()
        try:
            pruning.magnitude.update_masks(model, pruning.magnitude.dense_masks(model), 0, scope)
        except ValueError as error:
            raise cli.UsageError(f"--scope {scope}: {error}") from error


def prepare(setup: Setup, seed: int) -> tuple[nn.Module, History, ImageData]:
    """What the points of a seed share: the dense network, its history, the data to train on.

    Made once in a run; each later call finds the finished training in its checkpoint.
    """
    run, mnist, training = setup.run, setup.mnist, experiment.training
    model = training.initial(models.mnist_cnn.MnistCNN, seed, run.device)
    dense, history = training.train(model, mnist, setup.recipe, seed, run.task(f"seed {seed} dense"))
    if setup.distill:
        labels = run.once(
            f"soft targets of seed {seed}",
            lambda: training.soft_targets(mnist, dense, setup.distill, precision=run.precision),
        )
        return dense, history, training.with_labels(mnist, labels)
    return dense, history, mnist


def prune_and_measure(setup: Setup, point: Point) -> dict[str, Any]:
    """Train the dense network and the pruned one, compact that, measure all: the record of a point.

    A run of one point also saves its networks.
    """
    run, mnist = setup.run, setup.mnist
    dense_model, dense_history, train_data = prepare(setup, point.seed)
    model, history, updates = prune(setup, point, train_data)
    images = mnist.normalize(mnist.test_images[:256])
    small = pruning.compaction.compact(model, images[:1])
    costs = run.on_rank_0(lambda: experiment.measure.costs({"dense": dense_model, "compacted": small}, images))
    dense = describe(dense_model, dense_history, mnist) | costs["dense"]
    pruned = describe(model, history, mnist) | {"mask_updates": updates}
    compacted = experiment.report.describe(small, [], mnist) | costs["compacted"]
    record = {
        "seed": point.seed,
        "method": point.method,
        "scope": point.scope,
        "sparsity_target": point.schedule.final_sparsity,
        "drop": round(dense["test_accuracy"] - pruned["test_accuracy"], 4),
        "dense": dense,
        "pruned": pruned,
        "compacted": compacted,
    }
    for control in setup.controls if point.method == setup.controlled else ():
        task = run.task(f"{point} {control}")
        record[control] = describe(
            *train_under_masks(train_data, setup.recipe, model, point.seed, control, task), mnist
        )
    if run.jobs == 1:
        picture = None
        if pruned["nonzero_weights"] <= FEW_WEIGHTS:
            picture = experiment.picture.network(small, mnist.train_images, compacted["test_accuracy"])
        files = experiment.checkpoints.network_files(NAME, model, small, images[:2])
        run.write(files | {f"{NAME}_network.png": picture})
    return record


def prune_reference(setup: Setup, point: Point) -> None:
    """Train the network of a point whose counts layerwise_random takes over; `prune` finds it in its checkpoint."""
    *_, train_data = prepare(setup, point.seed)
    prune(setup, point, train_data)


def prune(setup: Setup, point: Point, train_data: ImageData) -> tuple[nn.Module, History, list[dict[str, Any]]]:
    """The pruned network of a point, its history and its mask updates; trained once in a run, as in `prepare`."""
    by_layer = None
    if point.method == "layerwise_random":
        reference, *_ = prune(setup, replace(point, method="magnitude"), train_data)
        weights = pruning.magnitude.prunable_weights(reference)
        by_layer = {name: 1 - int(weight.count_nonzero()) / weight.numel() for name, weight in weights.items()}
    return train_and_prune(train_data, setup.recipe, point, setup.run.task(str(point)), by_layer)


def train_and_prune(
    mnist: ImageData, recipe: Recipe, point: Point, task: Task | None = None, by_layer: dict[str, float] | None = None
) -> tuple[nn.Module, History, list[dict[str, Any]]]:
    """The network of the point's seed, pruned on its schedule while it trains; its history and its mask updates.

    With method layerwise_random, `by_layer` are the sparsities that each layer is to have in the end.
    """
    magnitude, training = pruning.magnitude, experiment.training
    model = training.initial(models.mnist_cnn.MnistCNN, point.seed, mnist.train_images.device)
    optimizer = training.sgd(model, recipe)
    masks = magnitude.dense_masks(model)
    squares = magnitude.average_squared_gradients(model, optimizer) if point.method == "obd" else {}
    hold = magnitude.keep_at_zero(model, masks, optimizer)
    method = "random" if point.method == "layerwise_random" else point.method
    updates = []

    def update(step: int) -> None:
        if point.schedule.prunes_at(step):
            planned = point.schedule.sparsity(step)
            sparsity = planned
            if by_layer:
                part = planned / (point.schedule.final_sparsity or 1)
                sparsity = {layer: part * final for layer, final in by_layer.items()}
            generator = training.generator(point.seed * 10**9 + step)  # of each step, so that it can be resumed
            magnitude.update_masks(model, masks, sparsity, point.scope, method, generator, squares)
            updates.append({"step": step, "planned": planned, "actual": magnitude.sparsity(model)})

    state = masks | {f"squared gradient of {name}": squares[name] for name in squares}
    hook = training.Hook(update, state=state, log=updates)
    history = training.fit(model, optimizer, mnist, recipe, point.seed, hook, task)
    magnitude.make_permanent(model, masks, hold)
    return model, history, updates


def train_under_masks(
    mnist: ImageData, recipe: Recipe, pruned: nn.Module, seed: int, control: str, task: Task
) -> tuple[nn.Module, History]:
    """The final masks of the pruned network on the weights it began with, its lottery ticket (Frankle & Carbin 2019,
    arXiv:1803.03635, §1), or on others, from scratch (Liu et al. 2019, arXiv:1810.05270, §3); trained as long.
    """
    magnitude, training = pruning.magnitude, experiment.training
    weights = seed if control == "ticket" else training.other(seed)
    model = training.initial(models.mnist_cnn.MnistCNN, weights, mnist.train_images.device)
    optimizer = training.sgd(model, recipe)
    masks = {name: weight != 0 for name, weight in magnitude.prunable_weights(pruned).items()}
    magnitude.apply_masks(magnitude.prunable_weights(model), masks)
    magnitude.keep_at_zero(model, masks, optimizer)
    return model, training.fit(model, optimizer, mnist, recipe, seed, task=task)


def describe(model: nn.Module, history: History, mnist: ImageData) -> dict[str, Any]:
    """The record of a trained network and of its weights."""
    weights = pruning.magnitude.prunable_weights(model)
    return experiment.report.describe(model, history, mnist) | experiment.measure.describe_weights(weights)


if __name__ == "__main__":
    cli.run(main)
