# SPDX-License-Identifier: Apache-2.0
"""What every input of the corpus is held to.

A case is an input that a user could hand to a command by mistake, or that looks wrong and is not.
It ends in the expected refusal (status 2, one line that names the input, nothing written) or in
the expected result, never in a traceback or a silently wrong answer.
"""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr


@pytest.fixture
def refusal(ddo, tmp_path):
    """Run a command that must refuse its input; the line that it prints.

    ``*needed`` are texts that the line must hold, the name of the input among them.
    """

    def run(command, *needed, out=None, **keys):
        out = tmp_path / "out.zarr" if out is None else Path(out)
        before = sorted(out.parent.iterdir())
        result = ddo(command, out=out, **keys)
        lines = [line for line in result.err.splitlines() if not line.endswith(" %")]
        assert result.status == 2, f"status {result.status}: {result.err}"
        assert len(lines) == 1 and lines[0].startswith("ddo: "), result.err
        for text in needed:
            assert text in lines[0], lines[0]
        assert sorted(out.parent.iterdir()) == before, "something was written"
        return lines[0]

    return run


@pytest.fixture
def accepted(ddo, tmp_path):
    """Run a command that must succeed; its store, finite throughout, and what it printed."""

    def run(command, out=None, **keys):
        out = tmp_path / "out.zarr" if out is None else Path(out)
        result = ddo(command, out=out, **keys)
        assert result.status == 0, result.err
        store = xr.open_zarr(out, consolidated=False).load()
        for name, values in store.data_vars.items():
            if values.dtype.kind == "f":
                assert np.isfinite(values).all(), f"{name} is not finite"
        return store, result

    return run
