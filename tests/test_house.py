# SPDX-License-Identifier: Apache-2.0
"""Limits that keep the package readable: parameters, lengths, one place for what is not public."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import ddo_modulus

ROOT = Path(ddo_modulus.__file__).parent
# Triton's kernels take every stride and size by itself.
MODULES = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "kernels.py"]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def parameters(function):
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [a.arg for a in every if a.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_short_and_its_functions_take_few_parameters(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 500
    wide = {
        node.name: len(parameters(node))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, FUNCTIONS) and len(parameters(node)) > 12
    }
    assert not wide


def test_assimilate_is_short():
    source = inspect.getsource(ddo_modulus.assimilate)
    (function,) = ast.parse(source).body
    body = function.body[1:]  # without the docstring
    assert body[-1].end_lineno - body[0].lineno < 80
    assert parameters(function) == [
        *("package", "observations", "times", "ensemble", "seed", "posterior", "quality"),
        *("background", "grid", "engine", "progress"),
    ]


def test_private_calls_of_torch_stand_in_one_file():
    private = re.compile(r"torch\._(?!_version__)\w+|from torch\.[\w.]*\._\w+ import")
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if private.search(re.sub(r"torch\.__version__", "", path.read_text(encoding="utf-8")))
    }
    assert found == {"compat.py"}
