# SPDX-License-Identifier: Apache-2.0
"""Ranks: their start under torchrun, srun or mpirun, their messages, their end.

Besides gradients ranks exchange two kinds of message, both between CPUs: a vote at each step
(:func:`vote`), which does not wait for the GPU, and the outcome of what some ranks do alone
(:func:`agree`), so that an error on one rank ends all of them with the same message.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from physicsnemo.distributed import DistributedManager

from ddo_modulus.errors import InputError, Stopped

T = TypeVar("T")


def initialize_distributed() -> None:
    """Start PhysicsNeMo's ``DistributedManager``, unless it is running.

    It finds its peers by the environment variables of torchrun, srun or mpirun, in this order;
    without any of them there is a single process.

    Raises:
        InputError: If the peers cannot be reached.
    """
    if DistributedManager.is_initialized():
        return
    if not _launched():
        # This is all that the manager does for a single process, apart from a warning.
        DistributedManager._shared_state["_is_initialized"] = True
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("LOCAL_RANK", "0")  # else the manager divides by the number of GPUs
    try:
        with _process_groups_for_all_devices():
            DistributedManager.initialize()
    except dist.DistError as error:
        DistributedManager._shared_state = {}
        raise InputError(
            f"the ranks cannot reach each other ({' '.join(str(error).split())}); "
            "check MASTER_ADDR and MASTER_PORT"
        ) from error


@contextmanager
def session() -> Iterator[DistributedManager]:
    """Ranks from their start to their end.

    At the end every rank waits for the others, so that no launcher ends one that is still writing,
    and an :class:`InputError` of one is raised on all. Only the first rank logs more than errors.
    """
    initialize_distributed()
    manager = DistributedManager()
    logger = logging.getLogger("ddo_modulus")
    level = logger.level
    if manager.rank:
        logger.setLevel(logging.ERROR)
    try:
        with together():
            yield manager
    except (InputError, Stopped):
        DistributedManager.cleanup()
        raise
    except BaseException:
        # The peers may never come to a collective that an orderly end waits for.
        if manager.distributed and manager.cuda:
            dist.distributed_c10d._abort_process_group()
            DistributedManager._shared_state = {}
        raise
    else:
        DistributedManager.cleanup()
    finally:
        logger.setLevel(level)


@contextmanager
def together() -> Iterator[None]:
    """A block after which an :class:`InputError` of one rank is raised on all."""
    failure = None
    try:
        yield
    except InputError as error:
        if getattr(error, "raised_on_all", False):
            raise
        failure = error
    agree(failure)


def agree(failure: InputError | None = None) -> None:
    """Wait for all ranks, and raise on all if one has failed.

    Calls of the ranks are matched in their order: a rank that fails earlier may join the others
    here from a later call (the end of :func:`together`).

    Args:
        failure: What went wrong on this rank.

    Raises:
        InputError: That of the first rank that failed.
    """
    messages = gather(None if failure is None else str(failure))
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        error = InputError(first)
        error.raised_on_all = True  # type: ignore[attr-defined]  # for enclosing blocks
        raise error from failure


def gather(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks."""
    if not _shared():
        return [value]
    values: list[Any] = [None] * DistributedManager().world_size
    dist.all_gather_object(values, value)
    return values


def vote(value: int) -> Callable[[], int]:
    """Start to compute the largest number of all ranks; the function returned waits for it."""
    if not _shared():
        return lambda: value
    ballot = torch.tensor(value)
    work = dist.all_reduce(ballot, dist.ReduceOp.MAX, async_op=True)

    def outcome() -> int:
        work.wait()
        return int(ballot)

    return outcome


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, element by element, in place."""
    if _shared():
        dist.all_reduce(values)
    return values


def _shared() -> bool:
    return DistributedManager.is_initialized() and DistributedManager().world_size > 1


def _launched() -> bool:
    variables = os.environ.keys()
    return (
        "PHYSICSNEMO_DISTRIBUTED_INITIALIZATION_METHOD" in variables
        or {"RANK", "WORLD_SIZE"} <= variables
        # A batch script of Slurm has a task number too, but only srun sets the address.
        or {"SLURM_PROCID", "SLURM_LAUNCH_NODE_IPADDR"} <= variables
        or "OMPI_COMM_WORLD_RANK" in variables
    )


@contextmanager
def _process_groups_for_all_devices() -> Iterator[None]:
    """Fix how PhysicsNeMo 2.2 starts the process group.

    It passes ``device_id``, which must have an index, so that a CPU is refused (NVIDIA/physicsnemo
    issue 1936): it is left out there. And it starts NCCL only: gloo is added for messages between
    CPUs, which then do not wait for a GPU.
    """
    start = dist.init_process_group

    def init_process_group(
        backend: str,
        *,
        device_id: torch.device | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        if device_id is not None and device_id.type == "cuda":
            backend, options["device_id"] = f"cpu:gloo,cuda:{backend}", device_id
        start(backend, **options)

    dist.init_process_group = init_process_group  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        dist.init_process_group = start


def broadcast(module: torch.nn.Module) -> None:
    """Give all ranks the weights and buffers of the first."""
    for value in module.state_dict().values():
        dist.broadcast(value, 0)
