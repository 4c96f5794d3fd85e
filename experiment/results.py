"""JSON and checkpoints: written whole or not at all."""

import copy
import io
import json
import math
import os
import platform
import statistics
import textwrap
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from experiment.errors import CheckpointError


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` so that `path` never shows a part of it: to a temporary name, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # that of a full disk does not say which file it was
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_all(folder: Path, contents: dict[str, bytes]) -> str:
    """Write each content whole, by file name; returns a line that says so."""
    for name, content in contents.items():
        write_whole(folder / name, content)
    return f"written to {folder}: {', '.join(contents)}"


def json_bytes(results: dict[str, Any]) -> bytes:
    """Indented JSON; raises ValueError for NaN or infinity, which are not JSON."""
    return (json.dumps(results, indent=2, allow_nan=False) + "\n").encode()


def checkpoint(model: nn.Module) -> bytes:
    """The content of a checkpoint file: class name, widths and state_dict of `model`, its zeros packed away."""
    state_dict = pack_state(model.state_dict())
    return saved({"network": type(model).__name__, "widths": list(model.widths), "state_dict": state_dict})


def saved(content: Any) -> bytes:  # noqa: ANN401  (whatever torch.save takes)
    """What torch.save writes into a file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load_saved(path: Path | str) -> dict[str, Any]:
    """What torch.save wrote, tensors on the CPU; nothing in it is ever run. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the checksums
            if altered := archive.testzip():
                raise CheckpointError(f"{altered} in it is altered: its checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a stranger's file can be wrong in any way
        raise CheckpointError(f"{path}: not a checkpoint ({one_line(error)})") from error


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """What `checkpoint` kept: {"network": class name, "widths": list, "state_dict": plain tensors on the CPU}.

    Raises CheckpointError.
    """
    content = load_saved(path)
    try:
        return {**content, "state_dict": unpack_state(content["state_dict"])}
    except Exception as error:
        raise CheckpointError(f"{path}: not a checkpoint of a network ({one_line(error)})") from error


def load_model(path: Path | str, network: type[nn.Module]) -> nn.Module:
    """The network that `checkpoint` kept, on the CPU: load_model("results/structured_cifar.pt", CifarCNN).

    Raises CheckpointError where there is no such file, anything else in it, or a number that is not finite.
    """
    content = load_checkpoint(path)
    try:
        if content["network"] != network.__name__:
            raise CheckpointError(f"it holds a {content['network']}")
        model = network(content["widths"])
        model.load_state_dict(content["state_dict"])
        for name, tensor in model.state_dict().items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{name} holds NaN or infinity")
    except Exception as error:
        raise CheckpointError(f"{path}: not a checkpoint of a {network.__name__} ({one_line(error)})") from error
    return model


def one_line(error: Exception) -> str:
    """What went wrong, in 200 characters at most."""
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")


def exported(model: nn.Module, example: Tensor) -> bytes:
    """The content of a file that torch.export.load reads: the network in eval mode, for batches of any size.

    `example` is a batch `(N, C, H, W)` of at least two.
    """
    model, images = copy.deepcopy(model).cpu().eval(), example.cpu()
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def pack_state(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """A state_dict on the CPU in which every tensor that gets smaller by it is packed by `pack_sparse`."""
    packed = {name: pack_sparse(tensor.cpu()) for name, tensor in state_dict.items()}
    return {
        name: packed[name] if packed_nbytes(packed[name]) < tensor.nbytes else tensor.cpu().contiguous()
        for name, tensor in state_dict.items()
    }


def unpack_state(packed: dict[str, Any]) -> dict[str, Tensor]:
    """The state_dict that `pack_state` was given, bit for bit (a -0.0 in a packed tensor comes back as 0.0)."""
    return {name: unpack_sparse(entry) if isinstance(entry, dict) else entry for name, entry in packed.items()}


def pack_sparse(tensor: Tensor) -> dict[str, Any]:
    """A tensor as its nonzero values and their positions: one bit per element, or int32 indices where that is less.

    pack_sparse(tensor([0., 7., 0.])) = {"shape": [3], "positions": tensor([0b01000000]), "values": tensor([7.])}
    """
    flat = tensor.flatten()
    indices = flat.nonzero().squeeze(1)
    bits = torch.from_numpy(np.packbits((flat != 0).numpy()))
    positions = bits if bits.nbytes <= 4 * len(indices) else indices.int()
    return {"shape": list(tensor.shape), "positions": positions, "values": flat[indices]}


def unpack_sparse(packed: dict[str, Any]) -> Tensor:
    """The tensor that `pack_sparse` was given."""
    flat = torch.zeros(math.prod(packed["shape"]), dtype=packed["values"].dtype)
    positions = packed["positions"]
    if positions.dtype == torch.uint8:
        positions = torch.from_numpy(np.unpackbits(positions.numpy(), count=len(flat))).bool()
    flat[positions] = packed["values"]
    return flat.view(packed["shape"])


def packed_nbytes(packed: dict[str, Any]) -> int:
    return packed["positions"].nbytes + packed["values"].nbytes


def mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and the sample standard deviation (n - 1), which one value alone does not have."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def summarize(
    runs: list[dict[str, Any]], by: Sequence[str], quantities: dict[str, Callable[[dict[str, Any]], float | None]]
) -> dict[str, Any]:
    """Mean and standard deviation over the seeds: of the dense accuracy, and of each quantity per values of `by`.

    A quantity that is None was not measured there, and is left out.
    """
    dense = {run["seed"]: run["dense"]["test_accuracy"] for run in runs}
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in by), []).append(run)
    return {
        "dense": mean_and_std(dense.values()),
        "pruned": [
            {
                **dict(zip(by, values, strict=True)),
                **{
                    name: mean_and_std(measured)
                    for name, quantity in quantities.items()
                    if None not in (measured := [quantity(run) for run in group])
                },
            }
            for values, group in groups.items()
        ],
    }


def with_std(value: dict[str, float | None] | None) -> str:
    """ "99.41 ± 0.03", or "99.41" of a single value, or nothing of what was not measured."""
    if value is None:
        return ""
    return f"{value['mean']:.2f}" + ("" if value["std"] is None else f" ± {value['std']:.2f}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first flush left, the others flush right."""
    columns = zip(header, *rows, strict=True)
    aligned = []
    for column, cells in enumerate(columns):
        width = max(map(len, cells))
        aligned.append([cell.rjust(width) if column else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(row) for row in zip(*aligned, strict=True))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware behind the numbers of a run."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a plain str, which a checkpoint may hold
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
    }


def processor_name() -> str:
    """The CPU's name as Linux tells it, or what Python knows elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
