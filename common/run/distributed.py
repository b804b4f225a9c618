"""Several processes that train or sample together, as `torchrun` starts them; with one process, nothing happens here.

Each process is a rank. What the ranks tell each other beside gradients goes through main memory (gloo), also where
gradients go from GPU to GPU (NCCL).
"""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.run.errors import UsageError, drop_what_nobody_takes

T = TypeVar("T")

PATIENCE = timedelta(hours=2)  # a slow download of the data; that a process has died is noticed at once

WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)  # how many processes there are
RANK = int(os.environ.get("RANK") or 0) if WORLD_SIZE > 1 else 0  # of all of them
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0) if WORLD_SIZE > 1 else 0  # of those on this machine


def start() -> None:
    """Joins the other processes.

    Raises:
        UsageError: there is a WORLD_SIZE, but not the rest that torch needs, and torchrun puts into the environment.
    """
    if WORLD_SIZE > 1:
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except ValueError as error:  # it names what is missing
            raise UsageError(f"{error}; start with torchrun, or unset WORLD_SIZE, which is {WORLD_SIZE}") from error
        maximum(0)  # waits for all: a rank that ended now would keep slower ones from joining


def stop() -> None:
    """Leaves the other processes, when the work is done."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # ends gloo's threads, which can abort the process if they outlive Python


def exit_after_error(status: int) -> NoReturn:
    """Ends the process; of several, at once: tidying up could wait for one that is gone."""
    if dist.is_initialized():
        drop_what_nobody_takes()
        os._exit(status)
    sys.exit(status)


def is_lost_connection(error: Exception) -> bool:
    """Whether the error says that another process could not be reached."""
    return WORLD_SIZE > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Gives tensors of every rank the values that they have on rank 0."""
    if WORLD_SIZE > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def average(tensors: Sequence[Tensor]) -> None:
    """Makes tensors of every rank the mean of all ranks', in one message."""
    if WORLD_SIZE > 1:
        total = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(total)
        total /= WORLD_SIZE
        parts = total.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for tensor, part in zip(tensors, parts)])


def hides_bars() -> bool | None:
    """What tqdm is to be told: on rank 0, None, which shows a bar where stderr is a terminal; elsewhere True."""
    return None if RANK == 0 and sys.stderr else True


def on_first(function: Callable[[], T]) -> T:
    """Calls the function on rank 0 alone. What it returns is returned on every rank; if it raises, all ranks end."""
    if WORLD_SIZE == 1:
        return function()
    box = [function() if RANK == 0 else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def merged(parts: dict[Any, T]) -> dict[Any, T]:
    """The parts of all ranks together, in the order of their keys, on every rank."""
    everyone = [parts] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(everyone, parts)
    together = {key: part for parts in everyone for key, part in parts.items()}
    return {key: together[key] for key in sorted(together)}


def maximum(value: int) -> int:
    """The largest of all ranks' values, on every rank."""
    if WORLD_SIZE == 1:
        return value
    result = torch.tensor(value)
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return int(result)
