# SPDX-License-Identifier: Apache-2.0
"""What an installation promises: quick import, public names, files that ship."""

import ast
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


def test_a_public_name_loads_from_its_module_and_is_kept(monkeypatch):
    monkeypatch.delitem(vars(ddo_modulus), "FourierBasis", raising=False)
    from ddo_modulus.fields.basis import FourierBasis

    assert ddo_modulus.FourierBasis is FourierBasis
    assert vars(ddo_modulus)["FourierBasis"] is FourierBasis


def test_type_checkers_see_the_same_names_in_the_same_modules():
    tree = ast.parse(Path(ddo_modulus.__file__).read_text())
    seen = {
        alias.asname: node.module.removeprefix("ddo_modulus.")
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == ddo_modulus._MODULE_OF
    assert set(seen) <= set(dir(ddo_modulus))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = ddo_modulus.Nonsense


def test_configuration_ships_inside_the_package():
    # conf/ at the top is a link for readers; what ships is the folder inside the package.
    assert (ROOT / "conf").resolve() == ROOT / "ddo_modulus" / "conf"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["ddo_modulus"]
