"""The processes that torchrun started, each of a rank, and what they do together; without torchrun there is rank 0."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Item = TypeVar("Item")


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device, processes: int) -> None:
    """Meet the other processes, if there are any; `processes` of them will train one network on their devices."""
    if launched() > 1:
        forever = timedelta(days=7)  # one that dies ends the launch by torchrun; one that is slow may be waited for
        if device.type == "cuda" and processes > 1:
            dist.init_process_group("nccl", timeout=forever, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=forever)


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Go on when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def share(items: Sequence[Item], do: Callable[[Item], object]) -> None:
    """Call `do(item)` once for each item, in one of the processes; go on when all of it is done."""
    for item in items[rank() :: launched()]:
        do(item)
    wait()


def first_alone(processes: int, make: Callable[[], Item]) -> Item:
    """What `make()` returns; where `processes` work on one thing, rank 0 calls it while the others rest."""
    if processes == 1:
        return make()
    made = [make() if rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]


def first_before_others(make: Callable[[], Item]) -> Item:
    """What `make()` returns, called on rank 0 first, so that the others find done what needs doing once."""
    if rank() > 0:
        wait()
    made = make()
    if rank() == 0:
        wait()
    return made


def add_up(value: Tensor) -> None:
    """Set `value` to its sum over all ranks."""
    dist.all_reduce(value)


def like_the_first(model: nn.Module) -> None:
    """Set the buffers, as BatchNorm's running statistics, to those of rank 0; the parameters are alike anyway."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
