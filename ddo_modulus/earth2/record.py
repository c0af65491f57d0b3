# SPDX-License-Identifier: Apache-2.0
"""The record of a run, beside its analyses: which times are done, and feedback of observations.

A folder::

    state.json                         settings of the run, times done, name of the state file
    state-2019-03-27T12.npz            what a cycle continues from
    departures/2019-03-27T12.parquet   observations with O-B and O-A, one file for each time
    statistics.parquet                 of O-B and O-A, by time and variable and over all times

``pandas.read_parquet(folder / "departures")`` reads all feedback at once
(:mod:`ddo_modulus.earth2.feedback`). Every file is written whole or not at all, and ``state.json``
last, after the analysis itself. So however a run ends, everything that ``state.json`` names exists.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ddo_modulus.earth2.feedback import statistics
from ddo_modulus.errors import InputError

FORMAT = 1

# Folder of the feedback. The name is older than the word, and stays so that runs can be continued.
_FEEDBACK = "departures"


@dataclass(frozen=True)
class RecordFolder:
    """Where the record of a run is kept.

    Attributes:
        path: Its folder. ``"beside"`` is next to the store of the analyses (``x.zarr`` and
            ``x.record``), or no record if the backend writes no file. None is no record, and the
            run cannot be continued.
        overwrite: Whether the record of another run in that folder is replaced.

    Raises:
        InputError: If an attribute is of another type.
    """

    path: str | Path | None = "beside"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.path is not None and not isinstance(self.path, str | Path):
            raise InputError(
                f"record={self.path!r} must be a folder, 'beside', None or a RecordFolder"
            )
        if not isinstance(self.overwrite, bool):
            raise InputError(f"RecordFolder: overwrite={self.overwrite!r} must be True or False")

    @classmethod
    def of(cls, record: str | Path | RecordFolder | None) -> RecordFolder:
        """From itself or a path.

        Raises:
            InputError: If it is something else.
        """
        return record if isinstance(record, RecordFolder) else cls(record)

    def resolve(self, beside: Path | None) -> RecordFolder:
        """The same, with a path in place of ``"beside"``."""
        return RecordFolder(beside, self.overwrite) if self.path == "beside" else self


class Record:
    """Progress and feedback of a run.

    Args:
        place: Where it is kept (:meth:`RecordFolder.resolve`).
        settings: What makes a run the same run; JSON.

    Raises:
        InputError: If the folder holds the record of a run with other settings, or something else.
    """

    def __init__(self, place: RecordFolder, settings: Mapping[str, Any]) -> None:
        self.folder = folder = None if place.path is None else Path(place.path)
        self.settings = json.loads(json.dumps(settings))
        self.done: list[str] = []
        self._state: str | None = None
        if folder is None or not folder.exists():
            return
        if not (folder / "state.json").is_file():
            if folder.is_dir() and not any(folder.iterdir()):
                return
            raise InputError(f"{folder} exists and is no record of a run; choose another folder")
        if place.overwrite:
            shutil.rmtree(folder)
            return
        self.done, self._state = self._read(folder)

    def _read(self, folder: Path) -> tuple[list[str], str | None]:
        """Times done and name of the state file."""
        try:
            header = json.loads((folder / "state.json").read_text())
            saved, done, state = header["settings"], header["done"], header["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder}/state.json cannot be read ({error}); {self.restart} starts the run anew"
            ) from None
        other = [k for k in {**saved, **self.settings} if saved.get(k) != self.settings.get(k)]
        if other or header.get("format") != FORMAT:
            what = ", ".join(f"{k}: {saved.get(k)!r}, now {self.settings.get(k)!r}" for k in other)
            raise InputError(
                f"{folder} is the record of another run ({what or 'another format'}); choose "
                f"another folder, or replace it by {self.restart}"
            )
        return done, state

    @property
    def restart(self) -> str:
        """The argument that replaces this record, for messages."""
        return f"record=RecordFolder({str(self.folder)!r}, overwrite=True)"

    def saved(self, time: np.datetime64) -> bool:
        """Whether a time is done."""
        return label(time) in self.done

    def save(
        self,
        time: np.datetime64,
        feedback: pd.DataFrame | None,
        state: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Note that the analysis of a time is written.

        Args:
            time: Analysis time.
            feedback: Of its observations (:func:`.feedback`), if there are any.
            state: What the next time needs, if anything.
        """
        self.done.append(label(time))
        if self.folder is None:
            return
        (self.folder / _FEEDBACK).mkdir(parents=True, exist_ok=True)
        if feedback is not None:
            path = self.folder / _FEEDBACK / f"{label(time)}.parquet"
            temporary = path.with_suffix(".part")
            feedback.to_parquet(temporary, index=False)
            os.replace(temporary, path)
        old, self._state = self._state, None
        if state is not None:
            self._state = f"state-{label(time)}.npz"
            temporary = self.folder / "state.part"
            with temporary.open("wb") as file:
                np.savez(file, **state)  # type: ignore[arg-type]
            os.replace(temporary, self.folder / self._state)
        header = {
            "format": FORMAT,
            "settings": self.settings,
            "done": self.done,
            "state": self._state,
        }
        temporary = self.folder / "state.json.part"
        temporary.write_text(json.dumps(header, indent=2) + "\n")
        os.replace(temporary, self.folder / "state.json")
        if old is not None and old != self._state:
            (self.folder / old).unlink(missing_ok=True)

    def state(self) -> dict[str, np.ndarray]:
        """What the last time left for the next one.

        Raises:
            InputError: If it cannot be read.
        """
        path = (self.folder or Path()) / str(self._state)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); {self.restart} starts the run anew"
            ) from None

    def finish(self) -> pd.DataFrame:
        """Statistics of all feedback so far, which are also written to the folder."""
        if self.folder is None:
            return statistics(pd.DataFrame())
        files = [self.folder / _FEEDBACK / f"{name}.parquet" for name in self.done]
        frames = [pd.read_parquet(path) for path in files if path.is_file()]
        table = statistics(pd.concat(frames) if frames else pd.DataFrame())
        if len(table):
            temporary = self.folder / "statistics.part"
            table.to_parquet(temporary, index=False)
            os.replace(temporary, self.folder / "statistics.parquet")
        return table


def label(time: np.datetime64) -> str:
    """A time as it stands in file names: ISO 8601 without colons and without trailing zeros."""
    text = str(time.astype("datetime64[s]")).replace(":", "")
    while text.endswith("00") and len(text) > len("2019-03-27T00"):
        text = text[:-2]
    return text
