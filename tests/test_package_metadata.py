# SPDX-License-Identifier: Apache-2.0
"""What an installation promises: quick import, public names, files that ship."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ddo_modulus

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "physicsnemo", "xarray", "pandas", "hydra")


def test_import_is_lazy():
    code = f"import sys, ddo_modulus; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ddo_modulus.__all__)
def test_every_public_name_loads(name):
    value = getattr(ddo_modulus, name)
    assert value.__name__ == name
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="attribute Nonsense"):
        _ = ddo_modulus.Nonsense


def test_configuration_ships_inside_the_package():
    # conf/ at the top is a link for readers; what ships is the folder inside the package.
    assert (ROOT / "conf").resolve() == ROOT / "ddo_modulus" / "conf"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["ddo_modulus"]
