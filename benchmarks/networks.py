"""Half of the filters of every group of torchvision's networks, by this project and by torch-pruning (DepGraph).

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.networks                        # all of them, an hour or more
    python -m benchmarks.networks --networks resnet18 vit_b_16 --part seconds

For each network, from the scores to the narrow network: the parameters left, the processor's seconds on one thread, as
the median of interleaved rounds, and the memory at the peak. Then, in float64 and with every number drawn anew, the
largest difference in eval mode from the masked network, the change from the dense one, and whether a training step
still runs. Writes networks.json after every network and takes up again where it stopped: rows that are there are
measured again only if they are named.
"""

import argparse
import copy
import ctypes
import gc
import json
import math
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer
from tqdm import tqdm

from experiment import report
from pruning.filters import filter_scores, filters_to_keep, mark_weakest
from pruning.surgery import Channels, find_channels, remove_filters
from tests.pruning.oracle import difference_from_masked, largest_difference, randomize

NAMES = [
    name for module in (models, models.segmentation, models.video) for name in models.list_models(module) if module
]
GIANTS = ("regnet_y_128gf", "vit_h_14")  # more than 600 million parameters: four copies in float64 take over 20 GB
OUTPUTS = (1000, 21, 400)  # classes of ImageNet, of segmentation and of Kinetics
PARTS = ("ours", "torch-pruning", "seconds")  # how exact each is, and what is timed of those that came to an end
NO_ANSWER = "no answer within "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NAMES, help="these alone, measured anew (default: all)")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS, help="these alone (default: all three)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is timed (default %(default)s)")
    parser.add_argument("--limit", type=int, default=600, help="seconds that each part may take (default %(default)s)")
    parser.add_argument("--results_dir", type=Path, default=Path("benchmarks/results"), help="folder for networks.json")
    args = parser.parse_args()
    path = args.results_dir / "networks.json"
    record = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    for name in tqdm(args.networks or [name for name in NAMES if name not in GIANTS], disable=None):
        row = record["rows"].setdefault(name, {})
        for part in args.part:
            if part not in row or args.networks:
                ended = [kind for kind in CUTS if not row.get(kind, {}).get("error", "").startswith(NO_ANSWER)]
                call = (timed, (name, ended, args.rounds)) if part == "seconds" else (compared, (name, part))
                row[part] = in_a_process(args.limit, *call)
        record["environment"] = {
            **report.environment(torch.device("cpu")),
            "torch-pruning": version("torch-pruning"),
        }
        args.results_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
    print(table(record["rows"]))
    print("left out for their size:", ", ".join(GIANTS))


def in_a_process(limit: int, make: Callable[..., dict[str, Any]], arguments: tuple) -> dict[str, Any]:
    """One part of a network's row, made in a process of its own, which may run out of memory or of time."""
    torch.set_num_threads(1)  # so that seconds of the processor are those of one thread
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            return pool.apply_async(make, arguments).get(limit)
        except multiprocessing.TimeoutError:
            return {"error": f"{NO_ANSWER}{limit} s"}


def build(name: str) -> nn.Module:
    """A network of torchvision with random weights."""
    options = {"weights_backbone": None} if name in models.list_models(models.segmentation) else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # saves a minute; the weights are random all the same
    torch.manual_seed(0)
    return models.get_model(name, weights=None, **options)


def example_of(name: str) -> Tensor:
    """Two images or videos, the smallest that the network takes."""
    if name in models.list_models(models.video):
        size = {"mvit_v1_b": (16, 224, 224), "mvit_v2_s": (16, 224, 224), "s3d": (16, 224, 224)}
        return torch.randn(2, 3, *size.get(name, (8, 64, 64)))
    if name.startswith(("vit", "maxvit")):
        return torch.randn(2, 3, 224, 224)
    return torch.randn(2, 3, 299, 299) if name == "inception_v3" else torch.randn(2, 3, 64, 64)


def half_by_us(model: nn.Module, example: Tensor) -> nn.Module:
    return half_of_groups(model, find_channels(model, example))


def half_of_groups(model: nn.Module, channels: Channels) -> nn.Module:
    scores = filter_scores(model, example=channels)
    marked = mark_weakest(scores, filters_to_keep(scores, 0.5, "quantile"))
    return remove_filters(model, channels, marked)[0]


def half_by_torch_pruning(model: nn.Module, example: Tensor) -> nn.Module:
    """In place, with the settings of its own tests of torchvision's networks."""
    is_vit = isinstance(model, VisionTransformer)
    tokens = [(model.class_token, 2), (model.encoder.pos_embedding, 2)] if is_vit else None
    outputs = [layer for layer in model.modules() if is_layer(layer) and len(layer.weight) in OUTPUTS]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=outputs,
        unwrapped_parameters=tokens,
        round_to=model.encoder.layers[0].num_heads if is_vit else None,
    )
    pruner.step()
    if is_vit:
        model.hidden_dim = model.conv_proj.out_channels
    return model


CUTS = {"ours": half_by_us, "torch-pruning": half_by_torch_pruning}


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def timed(name: str, kinds: list[str], rounds: int) -> dict[str, Any]:
    """Parameters left, seconds in every round and the memory at the peak, of each; fewer rounds where they are long."""
    model, example = build(name).eval(), example_of(name)
    found = {"parameters": size(model), "forward_mib": peak_mib(lambda: forward(model, example))[1]}
    found |= {kind: {"seconds": []} for kind in kinds}
    for turn in range(rounds):
        for kind in kinds[:: 1 if turn % 2 else -1]:
            mine, patient = found[kind], copy.deepcopy(model)
            if "error" in mine or sum(mine["seconds"]) > 20:
                continue
            try:
                (narrow, seconds), peak = peak_mib(
                    lambda kind=kind, patient=patient: clocked(CUTS[kind], patient, example)
                )
                mine["seconds"].append(seconds)
                mine |= {"parameters_left": size(narrow) / size(model), "peak_mib": peak}
            except Exception as error:
                mine["error"] = said(error)
    return found


def clocked(cut: Callable[..., nn.Module], model: nn.Module, example: Tensor) -> tuple[nn.Module, float]:
    """The network that is left, and the processor's seconds that the cut took."""
    start = time.process_time()
    return cut(model, example), time.process_time() - start


@torch.no_grad()
def forward(model: nn.Module, example: Tensor) -> Tensor:
    return model(example)


def peak_mib(call: Callable[[], Any]) -> tuple[Any, float | None]:
    """What the call returns, and the most memory that it took on top of what was held; None where it cannot be told."""
    gc.collect()
    try:  # Linux
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = memory("VmRSS")
    except (OSError, AttributeError):
        return call(), None
    result = call()
    return result, (memory("VmHWM") - before) / 1024


def memory(key: str) -> int:
    """A number of this process's status, in KiB."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def compared(name: str, kind: str) -> dict[str, Any]:
    """The differences from the masked and the dense network, and whether it trains, of what one of them cut."""
    example = example_of(name).double()
    model = randomize(build(name), example)
    found = {"difference": None, "change": None, "trains": None}
    try:
        narrow = CUTS[kind](copy.deepcopy(model).eval(), example)
        found["difference"] = difference_from_masked(model, narrow, example)
        found["change"] = largest_difference(model, narrow, example)
        found["trains"] = trains(narrow, example)
    except Exception as error:
        found["error"] = said(error)
    return found


def trains(model: nn.Module, example: Tensor) -> bool:
    """Whether a step of SGD runs in train mode, from a finite loss."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    outputs = [leaf for leaf in tree_leaves(model.train()(example)) if isinstance(leaf, Tensor)]
    loss = sum(leaf.square().mean() for leaf in outputs)
    loss.backward()
    optimizer.step()
    return math.isfinite(loss.item())


def said(error: Exception) -> str:
    """One line, and where it was raised."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text} ({Path(at.filename).name}:{at.lineno})"


def table(rows: dict[str, Any]) -> str:
    """Both side by side."""
    header = ["network", "parameters"]
    for kind in CUTS:
        header += [f"left, {kind}", "seconds", "MiB", "difference", "trains"]
    lines = [
        [name, number(row.get("seconds", {}).get("parameters"), "{:,}"), *cells(row)] for name, row in rows.items()
    ]
    return report.table(header, lines)


def cells(row: dict[str, Any]) -> list[str]:
    texts = []
    for kind in CUTS:
        cut = {**row.get("seconds", {}).get(kind, {}), **row.get(kind, {})}
        seconds = statistics.median(cut["seconds"]) if cut.get("seconds") else None
        texts += [number(cut.get("parameters_left"), "{:.3f}"), number(seconds, "{:.2f}")]
        texts += [number(cut.get("peak_mib"), "{:.0f}"), number(cut.get("difference"), "{:.0e}")]
        texts.append({True: "yes", False: "no", None: "–"}[cut.get("trains")])
    return texts


def number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


if __name__ == "__main__":
    main()
