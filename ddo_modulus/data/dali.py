# SPDX-License-Identifier: Apache-2.0
"""The fastest loader: NVIDIA DALI reads ahead in processes of its own.

Workers write states into shared memory, from where DALI passes them on without another copy, and a
batch goes to the GPU while the model trains on the one before. The pipeline reads, crops and
transfers. DALI has no operators for a climatology by hour and point, nor for shifts on a torus:
these are a few torch kernels on the GPU, applied to the pipeline's output.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

import copyreg
import multiprocessing
import re
from collections.abc import Generator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.data.stream import SampleOfStep, StoreLoader
from ddo_modulus.errors import InputError

if TYPE_CHECKING:
    from nvidia.dali.types import SampleInfo


class _Source:
    """What DALI calls in a worker for each state."""

    def __init__(self, read: SampleOfStep, start: int) -> None:
        self.read, self.start = read, start

    def __call__(self, info: SampleInfo) -> np.ndarray:
        try:
            return self.read(self.start + info.iteration, info.idx_in_batch)
        except Exception:
            # DALI passes errors on as RuntimeErrors. Dask's `distributed`, where it is installed,
            # registers a way of pickling these that DALI refuses to load.
            copyreg.dispatch_table.pop(RuntimeError, None)
            raise


class DaliLoader(StoreLoader):
    """Reads through a DALI pipeline: all workers read parts of each batch.

    Needs the extra ``dali``. On a CPU device the pipeline runs without a GPU.
    """

    def fields(self, start: int) -> Generator[Float[Tensor, "B C H W"]]:
        """As :meth:`StoreLoader.fields`."""
        from nvidia.dali import fn
        from nvidia.dali.pipeline import Pipeline
        from nvidia.dali.plugin.pytorch import DALIGenericIterator
        from nvidia.dali.types import DALIDataType

        on_gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self.order.share,
            num_threads=1,  # nothing is decoded here
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=2,
            py_num_workers=self.reading.workers,
            py_start_method="spawn",  # a fork would copy locks that threads hold
            exec_dynamic=True,  # lets torch take the output over without a copy
        )
        with pipeline:
            states = fn.external_source(
                source=_Source(SampleOfStep(self.reader, self.frames, self.order), start),
                parallel=True,
                batch=False,
                prefetch_queue_depth=self.reading.prefetch,
                dtype=DALIDataType.FLOAT,
                ndim=3,
            )
            pipeline.set_outputs(states.gpu() if on_gpu else states)
        others = set(multiprocessing.active_children())
        pipeline.start_py_workers()
        workers = set(multiprocessing.active_children()) - others
        try:
            batches = DALIGenericIterator([pipeline], ["states"], prepare_first_batch=False)
            while True:
                # DALI would wait forever for a process that died while it was idle.
                if not all(worker.is_alive() for worker in workers):
                    raise RuntimeError("a process ended")
                yield next(batches)[0]["states"]
        except Exception as error:
            raise _cause(error) from error


def _cause(error: Exception) -> Exception:
    """The reader's own error, which DALI passes on as text in a traceback."""
    messages = re.findall(r"InputError: (.*)", str(error))
    return InputError(messages[-1]) if messages else error
