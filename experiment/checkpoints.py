"""Networks and training states to files and back. A file is written whole or not at all."""

import copy
import io
import math
import os
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiment.cli import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A file with the state of one training, written every `every` epochs and at the end; 0: at the end alone."""

    path: Path
    every: int = 0

    def load(self) -> dict[str, Any] | None:
        """What `save` was given last, if anything. Raises CheckpointError for a file that holds something else."""
        return load_saved(self.path) if self.path.exists() else None

    def is_due(self, epoch: int, last: int) -> bool:
        """True where a checkpoint is to be written, in an epoch from 1 to `last`."""
        return epoch == last or (self.every > 0 and epoch % self.every == 0)

    def save(self, content: dict[str, Any]) -> None:
        write_whole(self.path, saved(content))


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


def write_all(folder: Path, contents: dict[str, bytes | None]) -> str:
    """Write each content whole, by file name, or remove the file if it is None; returns a line on what was written."""
    for name, content in contents.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_whole(folder / name, content)
    return f"written to {folder}: {', '.join(name for name in contents if contents[name] is not None)}"


def saved(content: Any) -> bytes:  # noqa: ANN401  (whatever torch.save takes)
    """What torch.save writes into a file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load_saved(path: Path | str) -> dict[str, Any]:
    """What torch.save wrote, tensors on the CPU; no code in it is run. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the checksums
            if altered := archive.testzip():
                raise CheckpointError(f"{altered} in it is altered: its checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a stranger's file can be wrong in any way
        raise CheckpointError(f"{path}: not a checkpoint ({one_line(error)})") from error


def network_bytes(model: nn.Module) -> bytes:
    """The content of a network's file: class name and version, widths and state_dict of `model`, zeros packed away."""
    state_dict = pack_state(model.state_dict())
    kind = {"network": type(model).__name__, "version": model.VERSION}
    return saved({**kind, "widths": list(model.widths), "state_dict": state_dict})


def load_model(path: Path | str, network: type[nn.Module]) -> nn.Module:
    """The network that `network_bytes` kept, on the CPU: load_model("results/structured_cifar.pt", CifarCNN).

    Raises CheckpointError where there is no such file, where it holds anything else or a number that is not finite.
    """
    content = load_saved(path)
    try:
        if content["network"] != network.__name__:
            raise CheckpointError(f"it holds a {content['network']}")
        if (version := content.get("version", 1)) != network.VERSION:
            raise CheckpointError(f"version {version} of it, made before this version of the project; train it again")
        model = network(content["widths"])
        model.load_state_dict(unpack_state(content["state_dict"]))
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
    model = copy.deepcopy(model).cpu().eval().to(memory_format=torch.contiguous_format)
    images = example.cpu().contiguous()
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def network_files(stem: str, model: nn.Module, small: nn.Module, example: Tensor) -> dict[str, bytes]:
    """The content of a network's files by name: `model` for `load_model`, the same without its zeros for torch.export.

    `example` is a batch `(N, C, H, W)` of at least two.
    """
    return {f"{stem}.pt": network_bytes(model), f"{stem}.pt2": exported(small, example)}


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
