# SPDX-License-Identifier: Apache-2.0
import re
import subprocess
import sys

import pytest

from ddo_modulus import __version__, cli
from ddo_modulus.cli.configuration import CONF, compose
from ddo_modulus.cli.main import COMMANDS, main
from ddo_modulus.errors import InputError


def test_help_is_quick_and_lists_the_commands():
    script = (
        "import sys; from ddo_modulus.cli.main import main; "
        "main(['--help']); main(['simulate', '-h']); "
        "assert not {'torch', 'xarray', 'physicsnemo'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert re.search(rf"^  {command} +[A-Z].{{20,80}}[a-z]$", done.stdout, re.M), done.stdout


def test_every_command_has_a_function():
    """They are named in two places: for calls, and for imports on first use."""
    assert set(cli.__all__) == set(COMMANDS)
    assert all(callable(getattr(cli, command).run) for command in COMMANDS)


@pytest.mark.parametrize("module", ["ddo_modulus", "ddo_modulus.cli"])
def test_runs_as_a_module(module):
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == __version__


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_every_key(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    for line in (CONF / f"{command}.yaml").read_text().splitlines():
        if re.match(r"\w+:", line) and not line.startswith("defaults"):
            assert line in shown
            assert "#" in line or shown.split(line)[0].rstrip().splitlines()[-1].startswith("#")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["fly"], "unknown command 'fly'; choose one of simulate"),
        (["simulate"], "simulate needs frames=... out=... trajectories=..."),
        (["simulate", "speed=1"], "unknown key 'speed'"),
        (["simulate", "simulator.speed=1"], "unknown key 'simulator.speed' (`ddo simulate"),
        (
            ["simulate", "simulator.raynolds=1"],
            "'simulator.raynolds'; did you mean simulator.reynolds?",
        ),
        (["train"], "ddo: You must specify 'experiment'; choose one of kolmogorov64"),
        (["simulate", "simulator=weather"], "choose one of kolmogorov"),
        (["simulate", "--out=x"], "not of the form key=value"),
        (["simulate", "x"], "not of the form key=value"),
    ],
)
def test_mistakes_take_one_line(arguments, match, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert match in captured.err


@pytest.mark.parametrize(
    "path", ["a b", "a[1]", "a=b", "~/x", "it's", "(1)", "a,b", "2019-03-27", "a[\\", "'\\'["]
)
def test_any_path_is_a_value(path):
    config = compose("simulate", ["trajectories=1", "frames=1", f"out={path}"])
    assert config.out == path
    assert config.seed == 0


def test_values_have_types():
    config = compose("prepare", ["source=x", "out=y", "variables=[t2m,u10m]", "overwrite=true"])
    assert list(config.variables) == ["t2m", "u10m"]
    assert config.overwrite is True


def test_errors_of_a_command(monkeypatch, capsys):
    import ddo_modulus.cli.simulate as command

    def fails(error):
        def run(config):
            raise error

        monkeypatch.setattr(command, "run", run)
        return main(["simulate", "trajectories=1", "frames=1", "out=x"])

    assert fails(InputError("two\nlines")) == 2
    assert capsys.readouterr().err == "ddo: two lines\n"
    assert fails(KeyboardInterrupt()) == 130
    with pytest.raises(RuntimeError):
        fails(RuntimeError("a defect"))
