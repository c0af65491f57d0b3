# SPDX-License-Identifier: Apache-2.0
"""BUFR messages as mappings from keys to values, as pdbufr reads them.

The keys of a message and their order depend only on its template, number of subsets and
replication factors, so they are listed once for each combination and cached. Keys of attributes
(`...->percentConfidence`) and of their bitmaps are left out: pdbufr would visit each of them and
use none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import eccodes
import numpy as np

from ddo_modulus.data.formats import silent_library
from ddo_modulus.earth2.sources.source import check_kind
from ddo_modulus.errors import InputError

_REPLICATIONS = (
    "delayedDescriptorReplicationFactor",
    "shortDelayedDescriptorReplicationFactor",
    "extendedDelayedDescriptorReplicationFactor",
)
_LAST_COORDINATE_CLASS = 9  # of Table B: such an element applies to those that follow it


class Structures:
    """What the messages of one file have in common, cached by template."""

    def __init__(self) -> None:
        self.keys: dict[tuple, list[str]] = {}
        self.is_coordinate: dict[str, bool] = {}
        self.descriptors: dict[tuple, frozenset[int]] = {}


class Message:
    """One message of a file; its values can be read until it is closed.

    Args:
        handle: ecCodes' handle; released when the message is closed.
        structures: Cache shared by the messages of a file.

    Attributes:
        at_end: Called with the message when its `with` block ends without an error.
    """

    def __init__(self, handle: int, structures: Structures) -> None:
        self._handle = handle
        self._structures = structures
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

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401 - a number, string or array
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
        """Whether a key is a coordinate, e.g. a height, that applies to the elements after it."""
        name = key.rpartition("#")[2]
        if name not in self._structures.is_coordinate:
            code = self.get(f"{key}->code")
            self._structures.is_coordinate[name] = (
                code is not None and int(code) // 1000 <= _LAST_COORDINATE_CLASS
            )
        return self._structures.is_coordinate[name]

    @property
    def descriptors(self) -> frozenset[int]:
        """Descriptors of the template's elements; does not unpack the message."""
        if self._template not in self._structures.descriptors:
            expanded = np.atleast_1d(self["expandedDescriptors"])
            self._structures.descriptors[self._template] = frozenset(map(int, expanded))
        return self._structures.descriptors[self._template]

    @cached_property
    def _keys(self) -> list[str]:
        structure = (*self._template, self["numberOfSubsets"], *map(self._fixed, _REPLICATIONS))
        if structure not in self._structures.keys:
            self._structures.keys[structure] = [
                key
                for key in self._all_keys()
                if "->" not in key and not key.endswith("#dataPresentIndicator")
            ]
        return self._structures.keys[structure]

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
    """Iterate over the messages of a file."""
    structures = Structures()
    with path.open("rb") as file:
        while (handle := eccodes.codes_bufr_new_from_file(file)) is not None:
            yield Message(handle, structures)


def check_messages(path: Path) -> None:
    """Refuse a file that is not BUFR or is incomplete; quick, since no message is unpacked.

    The headers and trailers of bulletins between the messages, as the GTS adds them, are no fault.

    Raises:
        InputError: If the file is missing, holds no message, or is damaged or cut short.
    """
    check_kind(path, "BUFR", "a BUFR file")
    with path.open("rb") as file:
        start = file.read(2**16)
    if b"BUFR" not in start:
        raise InputError(f"{path}: not a BUFR file (it starts with {start[:8]!r}); give one")
    try:
        with silent_library():
            extents = list(
                eccodes.codes_extract_offsets_sizes(str(path), eccodes.CODES_PRODUCT_BUFR)
            )
    except eccodes.CodesInternalError as error:
        raise InputError(
            f"{path}: damaged or cut short (a BUFR message is not whole); copy or download it again"
        ) from error
    with path.open("rb") as file:
        file.seek(sum(extents[-1]) if extents else 0)
        if b"BUFR" in file.read():
            raise InputError(f"{path}: the last message is cut short; copy or download it again")
