# SPDX-License-Identifier: Apache-2.0
"""Where results go: complete or not at all, and never over anything that is not of their kind.

A result is written under a hidden name beside its own, ``.NAME.new-HOST-PID``, and renamed at the
end. A folder cannot be renamed over another one, so an existing folder is first moved aside, to
``.NAME.old-HOST-PID``. A process that is killed between the two renames leaves that name behind;
the next command that writes to NAME, or is asked to, moves it back and says so. It also removes
what other dead processes of this machine have left.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ddo_modulus.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputKind:
    """A kind of result.

    Attributes:
        name: What messages call it, with its article.
        recognised: Whether an existing path holds a result of this kind.
    """

    name: str
    recognised: Callable[[Path], bool]

    @classmethod
    def folder_with(cls, name: str, *files: str) -> OutputKind:
        """A folder that holds at least one of these files."""
        return cls(name, lambda path: any((path / file).is_file() for file in files))


FILE = OutputKind("a file", Path.is_file)
STORE = OutputKind.folder_with("a zarr store", "zarr.json", ".zgroup")
REPORT = OutputKind.folder_with("a report of `ddo verify`", "scores.json")
ENGINE = OutputKind.folder_with("a folder of `ddo export`", "engine.json")
PACKAGE = OutputKind.folder_with("a package", "package.json")


def check_output(
    path: str | Path,
    *,
    overwrite: bool = False,
    kind: OutputKind | None = None,
    inputs: Iterable[object] = (),
) -> Path:
    """Refuse a path to which a result cannot be written; call it before a long computation.

    Args:
        path: File or folder of the result.
        overwrite: Whether an existing result may be replaced.
        kind: Kind of the result: only one of the same kind is replaced. None: any.
        inputs: Paths that the same command reads; those that are None are left out.

    Returns:
        The path.

    Raises:
        InputError: If the path exists and may not be replaced, is not of this kind, holds or is an
            input or the working directory, lies below a file, or cannot be written.
    """
    path = Path(path)
    _check_name(path)
    _heal(path)
    for value in inputs:
        _check_input(path, value)
    if os.path.lexists(path):
        _check_existing(path, overwrite, kind)
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"{path}: {parent} is not a folder; choose another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: {parent} is read-only; choose another path")
    return path


@contextmanager
def replacing(
    path: str | Path, *, overwrite: bool = False, kind: OutputKind | None = None
) -> Iterator[Path]:
    """Write a file or folder to a temporary path that is renamed to `path` at the end.

    An error or an interruption in the block leaves `path` unchanged.

    Args:
        path: File or folder of the result.
        overwrite: Whether an existing result may be replaced.
        kind: Kind of the result: only one of the same kind is replaced. None: any.

    Yields:
        A path in the same folder as `path` that does not exist yet.

    Raises:
        InputError: As `check_output`, or if the disk is full.
    """
    path = check_output(path, overwrite=overwrite, kind=kind)
    new, old = (_temporary(path, tag) for tag in ("new", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(new)
        try:
            yield new
        except BaseException:
            _await_zarr()
            raise
        if path.is_dir() and not path.is_symlink():
            path.rename(old)
        try:
            new.replace(path)
        except BaseException:
            if os.path.lexists(old):
                old.rename(path)
            raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise InputError(
            f"{path} cannot be written: {os.strerror(error.errno).lower()}. What was there is "
            "unchanged; free some space, or choose another place"
        ) from error
    finally:
        _remove(new)
    _remove(old)


def _await_zarr() -> None:
    """Wait for the chunks that zarr is writing: it goes on with the others where one fails.

    They would appear anew in the folder that is being removed.
    """
    zarr_sync = sys.modules.get("zarr.core.sync")
    if zarr_sync is None:
        return

    async def others() -> None:
        writes = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*writes, return_exceptions=True)

    with suppress(TimeoutError):
        zarr_sync.sync(others(), timeout=60)


def _check_name(path: Path) -> None:
    """Refuse a name that the file system cannot have, with the hidden one that is made of it."""
    try:
        os.path.lexists(path)
        _temporary(path, "new").lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            return  # the checks of the path itself say more
        raise InputError(f"{str(path)[:80]} is no name for a result: {error}") from error


def _check_existing(path: Path, overwrite: bool, kind: OutputKind | None) -> None:
    if not path.exists():
        raise InputError(f"{path} is a link to nothing; remove it, or choose another path")
    if not overwrite:
        raise InputError(f"{path} exists; choose another path, or replace it by overwrite=true")
    if path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{path} holds the working directory; choose another path")
    empty = path.is_dir() and not any(path.iterdir())
    if kind is not None and not empty and not kind.recognised(path):
        raise InputError(f"{path} exists and is not {kind.name}; choose another path")


def _check_input(path: Path, value: object) -> None:
    """Refuse an output that is, or holds, or lies in, an input of the same command."""
    # Unlike Path.exists, this is no error for a name that is too long.
    if value is None or "://" in str(value) or not os.path.exists(str(value)):
        return
    one, other = path.resolve(), Path(str(value)).resolve()
    if one == other or one in other.parents or (other in one.parents and os.path.lexists(one)):
        raise InputError(
            f"{path} is read by this command ({value}): its result would replace it; choose "
            "another path"
        )


def _host() -> str:
    """This machine's name, as far as a file's name can hold it."""
    return re.sub(r"[^\w]", "", socket.gethostname())[:16]


def _temporary(path: Path, tag: str) -> Path:
    path = path if path.name else path.absolute()
    return path.with_name(f".{path.name}.{tag}-{_host()}-{os.getpid()}")


def _heal(path: Path) -> None:
    """Undo what processes of this machine that died while they replaced `path` have left."""
    pattern = re.compile(re.escape(f".{path.name}.") + rf"(new|old)-{_host()}-(\d+)")
    try:
        names = sorted(entry.name for entry in os.scandir(path.parent))
    except OSError:
        return
    left = [m for name in names if (m := pattern.fullmatch(name)) and not _alive(int(m[2]))]
    for match in left:
        place = path.with_name(match[0])
        if match[1] == "old" and not os.path.lexists(path):
            place.rename(path)
            log.warning("%s is restored: a process was killed while it replaced it", path)
        else:
            _remove(place)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
