# SPDX-License-Identifier: Apache-2.0
"""The configuration of a command: Hydra composes it from ``conf/`` and the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddo_modulus.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).parents[1] / "conf"


def compose(command: str, overrides: Sequence[str]) -> DictConfig:
    """The complete configuration of a command; ``resume`` takes the run's own.

    Args:
        command: Name of a file in ``conf/``.
        overrides: ``key=value`` in Hydra's grammar; a value that does not parse is plain text.

    Raises:
        InputError: If an argument has another form, a key or choice is unknown, or one is missing.
    """
    from ddo_modulus.cli.schema import check_keys  # imports torch: only once the keys are known

    for override in overrides:
        if re.match(r"[+~]*hydra[./]", override):
            raise InputError(f"{override} is an option of sweeps: `ddo train -m ...`")
    overrides = [parsable(override) for override in overrides]
    if command == "resume":
        config = _compose_run(overrides)
    else:
        config = complete(command, load(command, overrides))
    check_keys(command, config)
    return config


def _compose_run(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a run with changes, whatever has become of ``conf/`` since.

    Args:
        overrides: ``out=...``, the folder of the run, and changes, in Hydra's grammar.

    Raises:
        InputError: If the folder does not hold a run, or a key is unknown.
    """
    from omegaconf import OmegaConf, open_dict

    from ddo_modulus.cli.run_folder import CONFIG, open_run

    place = [override for override in overrides if override.startswith("out=")]
    changes = [override for override in overrides if override not in place]
    out = Path(complete("resume", load("resume", place)).out)
    open_run(out)
    # `overwrite=true` may be in the run's configuration; it was meant for its first start.
    control = [f"out={quoted(str(out))}", "resume=true", "overwrite=false"]
    config = load(Path(CONFIG).stem, [*control, *changes], folder=out, command="resume")
    # A run of an older version lacks newer keys: today's defaults fill them in.
    today = load("train", ["~experiment", "~operator"])
    with open_dict(config):
        OmegaConf.set_struct(today, False)  # `run` refuses keys that only another version has
        for section in ("trainer", "data"):  # the others depend on the experiment
            config[section] = OmegaConf.merge(today[section], config[section])
    return complete("resume", config)


def load(
    name: str, overrides: Sequence[str], folder: Path | None = None, command: str | None = None
) -> DictConfig:
    """Compose a file of ``conf/`` with all that it includes; values may be missing.

    It also sets Hydra's global configuration, which ``${hydra:...}`` and the record of a run read.

    Args:
        name: Name of the file without its suffix.
        overrides: ``key=value`` in Hydra's grammar.
        folder: Folder of the file if it is not ``conf/``.
        command: Command that errors name; by default that of the file.

    Raises:
        InputError: If a key or choice is unknown.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    try:
        with hydra.initialize_config_dir(str((folder or CONF).absolute()), version_base="1.3"):
            config = hydra.compose(name, list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise one_line(command or name, error) from error
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def complete(command: str, config: DictConfig) -> DictConfig:
    """Resolve the interpolations of a configuration in place and check that no value is missing.

    Raises:
        InputError: If a value is missing or an interpolation cannot be resolved.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if not missing:
            OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise one_line(command, error) from error
    if missing:
        needed = " ".join(f"{key}=..." for key in missing)
        raise InputError(f"{command} needs {needed} (`ddo {command} --help` explains them)")
    return config


def one_line(command: str, error: Exception) -> InputError:
    """An error of Hydra's in one line: its own take many, with a search path and a traceback."""
    message = str(error).split("\nTo append")[0].split("\nConfig search path")[0]
    message = re.sub(r"^In '.+?': |, e\.g, \S+", "", message)
    message = re.sub(r"\s*Available options.*:\s*", "; choose one of ", message)
    message = re.sub(r"Could not override '(.+)'\.?", r"unknown key '\1'", message)
    message += _suggestion(error.__cause__)
    if "hydra/launcher/submitit" in message and find_spec("submitit") is None:
        message = "hydra/launcher=submitit_... needs a package: pip install 'ddo-modulus[sweep]'"
    return InputError(f"{message} (`ddo {command} --help` lists all keys)")


def _suggestion(cause: BaseException | None) -> str:
    """Ask whether a key like the unknown one was meant, if there is one."""
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    if not (
        isinstance(cause, OmegaConfBaseException) and isinstance(cause.parent_node, DictConfig)
    ):
        return ""
    key = str(cause.key)
    near = get_close_matches(key, map(str, cause.parent_node), 1)
    return f"; did you mean {str(cause.full_key).removesuffix(key)}{near[0]}?" if near else ""


def parsable(override: str, *, sweeps: bool = False) -> str:
    """Quote a value outside Hydra's grammar, so that users need not quote paths with brackets.

    Args:
        override: ``key=value``.
        sweeps: Whether ``a,b`` stands for two values; otherwise it is plain text.

    Raises:
        InputError: If the override is not of the form ``key=value``, or it removes a key.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if override.startswith("~"):
        raise InputError(f"{override!r}: keys cannot be removed; give key=value, or leave it out")
    # Hydra would add a key after +, but a command knows all of its keys.
    override = override.lstrip("+")
    if not re.match(r"(?!-)[\w@./-]*\w=", override, re.ASCII):
        raise InputError(f"{override!r} is not of the form key=value")
    try:
        parsed = OverridesParser.create().parse_override(override)
        if sweeps or not parsed.is_sweep_override():
            return override
    except HydraException:
        pass
    key, _, value = override.partition("=")
    return f"{key}={quoted(value)}"


def quoted(text: str) -> str:
    """Plain text as a quoted value of Hydra's grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], within: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values; None stands for a missing one."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**one, **other}:
        a, b, path = one.get(key), other.get(key), f"{within}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{path}.")
        elif a != b:
            found[path] = a, b
    return found
