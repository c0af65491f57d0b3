# SPDX-License-Identifier: Apache-2.0
"""The modules of ``benchmarks/``, which is no package."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def imported():
    """Imports a module by its name, as it is when it is run."""

    def load(name):
        sys.path.insert(0, str(FOLDER))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(FOLDER))

    return load
