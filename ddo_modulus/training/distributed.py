# SPDX-License-Identifier: Apache-2.0
"""Ranks: their start under torchrun, srun or mpirun, what they tell each other, their end.

Two kinds of message travel beside the gradients, both between CPUs: a vote at each step
(:func:`vote`), which needs no answer from the GPU, and the outcome of what some ranks do alone
(:func:`agree`), so that a mistake that one rank finds ends all of them with the same words.
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
    """Start PhysicsNeMo's ``DistributedManager``, unless it runs already.

    It finds its peers by the environment of torchrun, srun or mpirun, in this order; without any,
    the process stands alone.

    Raises:
        InputError: If the peers cannot be reached.
    """
    if DistributedManager.is_initialized():
        return
    if not _launched():
        # All that the manager does for a single process, less its warning.
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

    On the way out every rank waits for the others, so that none is ended by its launcher while
    it still writes, and an :class:`InputError` of one becomes that of all. Ranks but the first
    log errors only.
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
    """A block that all ranks leave alike: with the :class:`InputError` of any one of them."""
    failure = None
    try:
        yield
    except InputError as error:
        if getattr(error, "told", False):
            raise
        failure = error
    agree(failure)


def agree(failure: InputError | None = None) -> None:
    """Wait for all ranks, and raise on all if one has failed.

    A rank that fails before it comes to this point may meet the others in a later call (the end of
    :func:`together`): one call pairs with one call.

    Args:
        failure: What went wrong on this rank.

    Raises:
        InputError: That of the first rank that failed.
    """
    messages = gather(None if failure is None else str(failure))
    told = next((message for message in messages if message is not None), None)
    if told is not None:
        error = InputError(told)
        error.told = True  # type: ignore[attr-defined]  # for enclosing blocks
        raise error from failure


def gather(value: T) -> list[T]:
    """What each rank says, in their order."""
    if not _shared():
        return [value]
    values: list[Any] = [None] * DistributedManager().world_size
    dist.all_gather_object(values, value)
    return values


def vote(value: int) -> Callable[[], int]:
    """Ask for the largest of all ranks' numbers; the function returned waits for it."""
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
    given = os.environ.keys()
    return (
        "PHYSICSNEMO_DISTRIBUTED_INITIALIZATION_METHOD" in given
        or {"RANK", "WORLD_SIZE"} <= given
        # A batch script of Slurm has a task number too, but only srun says where the tasks meet.
        or {"SLURM_PROCID", "SLURM_LAUNCH_NODE_IPADDR"} <= given
        or "OMPI_COMM_WORLD_RANK" in given
    )


@contextmanager
def _process_groups_for_all_devices() -> Iterator[None]:
    """Mend how PhysicsNeMo 2.2 starts the process group.

    It passes ``device_id``, which must have an index and so refuses the CPU (NVIDIA/physicsnemo
    issue 1936): dropped there. And it starts NCCL alone: gloo beside it carries the messages
    between CPUs, which then wait for no GPU.
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


def alike(module: torch.nn.Module) -> None:
    """Give all ranks the weights and buffers of the first."""
    for value in module.state_dict().values():
        dist.broadcast(value, 0)
