# SPDX-License-Identifier: Apache-2.0
"""BUFR messages as pdbufr takes them: mappings of keys to values.

The keys of a message and their order follow from its template, its number of subsets and its
replications, so they are found once for each of these and remembered. Keys of attributes
(`...->percentConfidence`) and of the bitmaps that go with them are left out, for pdbufr looks at
each and uses none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import eccodes
import numpy as np

from ddo_modulus.errors import InputError

_REPLICATIONS = (
    "delayedDescriptorReplicationFactor",
    "shortDelayedDescriptorReplicationFactor",
    "extendedDelayedDescriptorReplicationFactor",
)
_LAST_COORDINATE_CLASS = 9  # of Table B: what stands there holds for the elements after it


class Structures:
    """What is remembered of the messages of one file."""

    def __init__(self) -> None:
        self.keys: dict[tuple, list[str]] = {}
        self.is_coordinate: dict[str, bool] = {}
        self.descriptors: dict[tuple, frozenset[int]] = {}


class Message:
    """One message of a file; its values can be read until it is closed.

    Args:
        handle: Of ecCodes; released when the message is closed.
        structures: Shared by the messages of a file.

    Attributes:
        at_end: Called with the message when a `with` block that used it ends well.
    """

    def __init__(self, handle: int, structures: Structures) -> None:
        self._handle = handle
        self._known = structures
        self.at_end: Callable[[Message], None] | None = None

    def __enter__(self) -> Message:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and self.at_end is not None:
            self.at_end(self)
        self.close()

    def close(self) -> None:
        """Release the message."""
        eccodes.codes_release(self._handle)

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401 - a number, a text or an array
        try:
            if eccodes.codes_get_size(self._handle, key) > 1:
                return eccodes.codes_get_array(self._handle, key)
            return eccodes.codes_get(self._handle, key)
        except eccodes.KeyValueNotFoundError as error:
            raise KeyError(key) from error

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - as above
        """The value of a key, or `default` if the message has none."""
        try:
            return self[key]
        except KeyError:
            return default

    def __setitem__(self, key: str, value: float | int | str) -> None:
        eccodes.codes_set(self._handle, key, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def is_coord(self, key: str) -> bool:
        """Whether what a key stands for, as a height, holds for the elements after it."""
        name = key.rpartition("#")[2]
        if name not in self._known.is_coordinate:
            code = self.get(f"{key}->code")
            self._known.is_coordinate[name] = (
                code is not None and int(code) // 1000 <= _LAST_COORDINATE_CLASS
            )
        return self._known.is_coordinate[name]

    @property
    def descriptors(self) -> frozenset[int]:
        """The elements that the template has; known without unpacking."""
        if self._template not in self._known.descriptors:
            expanded = np.atleast_1d(self["expandedDescriptors"])
            self._known.descriptors[self._template] = frozenset(map(int, expanded))
        return self._known.descriptors[self._template]

    @cached_property
    def _keys(self) -> list[str]:
        structure = (*self._template, self["numberOfSubsets"], *map(self._fixed, _REPLICATIONS))
        if structure not in self._known.keys:
            self._known.keys[structure] = [
                key
                for key in self._all_keys()
                if "->" not in key and not key.endswith("#dataPresentIndicator")
            ]
        return self._known.keys[structure]

    @cached_property
    def _template(self) -> tuple:
        return self._fixed("unexpandedDescriptors")

    def _fixed(self, key: str) -> tuple:
        value = self.get(key)
        return () if value is None else tuple(np.atleast_1d(value).tolist())

    def _all_keys(self) -> Iterator[str]:
        iterator = eccodes.codes_bufr_keys_iterator_new(self._handle)
        while eccodes.codes_bufr_keys_iterator_next(iterator):
            yield eccodes.codes_bufr_keys_iterator_get_name(iterator)
        eccodes.codes_bufr_keys_iterator_delete(iterator)


def messages(path: Path) -> Iterator[Message]:
    """The messages of a file, one after the other."""
    structures = Structures()
    with path.open("rb") as file:
        while (handle := eccodes.codes_bufr_new_from_file(file)) is not None:
            yield Message(handle, structures)


def check_messages(path: Path) -> None:
    """Refuse what is not a whole file of BUFR messages; quick, for nothing is unpacked.

    Raises:
        InputError: If the file is missing, holds no message, or is damaged or cut short.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    with path.open("rb") as file:
        start = file.read(2**16)
    if b"BUFR" not in start:
        raise InputError(f"{path}: no BUFR file (it starts with {start[:8]!r}); give one")
    try:
        sizes = eccodes.codes_extract_offsets_sizes(str(path), eccodes.CODES_PRODUCT_BUFR)
        end = sum(list(sizes)[-1])
    except eccodes.CodesInternalError as error:
        raise InputError(
            f"{path}: damaged or cut short ({error}); copy or download it again"
        ) from error
    with path.open("rb") as file:
        file.seek(end)
        if b"BUFR" in file.read():
            raise InputError(f"{path}: the last message is cut short; copy or download it again")
