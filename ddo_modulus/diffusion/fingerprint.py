# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: that the parts of a package belong together.

``package.json`` holds a SHA-256 sum of each other file, and one of each entry that the weights are
bound to: variables, grid, task, and the noise levels of training. The sum ``whole`` is over the
others, so that a part cannot be exchanged together with its own sum. Provenance and the other
options of sampling may be edited.

``python -m ddo_modulus.diffusion.fingerprint FOLDER...`` adds the fingerprint to packages that were
written without one. It changes nothing but ``package.json``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddo_modulus.errors import InputError

log = logging.getLogger(__name__)

HEADER = "package.json"

#: Files of a package beside its header; the last one is optional.
FILES = ("operator.mdlus", "normalization.npz", "orography.npy")

#: Entries of the header that are bound to the weights, by the name that messages give them.
ENTRIES: Mapping[str, tuple[str, ...]] = {
    "channels": ("channels", "units"),
    "grid": ("grid",),
    "task": ("condition", "coarse", "frames", "interval"),
}
_LEVELS = ("sigma_min", "sigma_max")


def fingerprint(folder: Path, header: Mapping[str, Any]) -> dict[str, str]:
    """Sums of the parts of a package by name.

    Args:
        folder: Folder of the package; its files are read.
        header: Content of ``package.json``.
    """
    sums = {name: file_sum(folder / name) for name in FILES if (folder / name).is_file()}
    for name, keys in ENTRIES.items():
        sums[name] = json_sum([header.get(key) for key in keys])
    sums["sampling"] = json_sum([header["sampling"].get(key) for key in _LEVELS])
    return sums | {"whole": json_sum(sums)}


def check_fingerprint(folder: Path, header: Mapping[str, Any]) -> None:
    """Refuse a package whose parts do not belong together.

    Packages of earlier versions have no fingerprint: they pass, with a line in the log.

    Raises:
        InputError: If a part is not the one that the package was written with.
    """
    stated = header.get("fingerprint")
    if stated is None:
        log.info(
            "%s is of an earlier version, without a fingerprint: its parts are not compared", folder
        )
        return
    if not isinstance(stated, dict):
        raise InputError(f"{folder / HEADER}: fingerprint={stated!r} must be sums by part")
    found = fingerprint(folder, header)
    names = [name for name in {**stated, **found} if found.get(name) != stated.get(name)]
    names.sort(key="whole".__eq__)  # the others say more
    if names:
        own = names[0] in ENTRIES or names[0] in ("sampling", "whole")
        where = f"{folder / HEADER}: {names[0]}" if own else str(folder / names[0])
        raise InputError(
            f"{where} is not what this package was written with: it is changed, or another "
            "package's; copy all files of one package again"
        )


def file_sum(path: Path) -> str:
    """SHA-256 sum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sum(content: object) -> str:
    """SHA-256 sum of JSON content, whatever its layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stamp(folder: str | Path) -> None:
    """Add the fingerprint to a package that was written without one."""
    path = Path(folder) / HEADER
    header = json.loads(path.read_text())
    header["fingerprint"] = fingerprint(path.parent, header)
    path.write_text(json.dumps(header, indent=2) + "\n")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        stamp(argument)
