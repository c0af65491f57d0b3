# SPDX-License-Identifier: Apache-2.0
"""The record beside a run's analyses: what is done, where it stands, what the observations said.

A folder::

    state.json                      settings of the run, times done, name of the state
    state-2019-03-27T12.npz         what a cycle goes on from
    departures/2019-03-27T12.parquet   observations with O-B and O-A, one file a time
    statistics.parquet              of the departures, by time and variable and over all times

``pandas.read_parquet(folder / "departures")`` reads all departures at once. Every file is written
whole or not at all, and ``state.json`` last, after the analysis itself: whatever ends a run, what
it names is there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.verification.innovations import desroziers, reduced_chi_square

FORMAT = 1


class Record:
    """Progress and departures of a run.

    Args:
        folder: Where it is kept; None keeps nothing, and nothing can be continued.
        settings: What makes the run the same run: JSON.
        overwrite: Whether another run's record there may be replaced.

    Raises:
        InputError: If the folder holds the record of a run with other settings, or something else.
    """

    def __init__(
        self, folder: Path | None, settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.done: list[str] = []
        self._state: str | None = None
        if folder is None or not folder.exists():
            return
        if not (folder / "state.json").is_file():
            if folder.is_dir() and not any(folder.iterdir()):
                return
            raise InputError(f"{folder} is there and is no record of a run; choose another place")
        if overwrite:
            shutil.rmtree(folder)
            return
        try:
            header = json.loads((folder / "state.json").read_text())
            saved, done, state = header["settings"], header["done"], header["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder}/state.json cannot be read ({error}); overwrite=True starts anew"
            ) from None
        other = [k for k in {**saved, **self.settings} if saved.get(k) != self.settings.get(k)]
        if other or header.get("format") != FORMAT:
            what = ", ".join(f"{k}: {saved.get(k)!r}, now {self.settings.get(k)!r}" for k in other)
            raise InputError(
                f"{folder} is the record of another run ({what or 'another format'}); choose "
                "another place, or replace it by overwrite=True"
            )
        self.done, self._state = done, state

    def saved(self, time: np.datetime64) -> bool:
        """Whether a time is done."""
        return label(time) in self.done

    def save(
        self,
        time: np.datetime64,
        departures: pd.DataFrame | None,
        state: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Note that the analysis of a time is written.

        Args:
            time: Analysis time.
            departures: Its observations (:mod:`ddo_modulus.earth2.departures`), if there are.
            state: What the next time needs, if anything.
        """
        self.done.append(label(time))
        if self.folder is None:
            return
        (self.folder / "departures").mkdir(parents=True, exist_ok=True)
        if departures is not None:
            path = self.folder / "departures" / f"{label(time)}.parquet"
            temporary = path.with_suffix(".part")
            departures.to_parquet(temporary, index=False)
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
        """What the last time saved left for the next.

        Raises:
            InputError: If it is lost.
        """
        path = (self.folder or Path()) / str(self._state)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); overwrite=True starts the run anew"
            ) from None

    def finish(self) -> pd.DataFrame:
        """Statistics of all departures so far; written beside them."""
        if self.folder is None:
            return statistics(pd.DataFrame())
        files = [self.folder / "departures" / f"{name}.parquet" for name in self.done]
        frames = [pd.read_parquet(path) for path in files if path.is_file()]
        table = statistics(pd.concat(frames) if frames else pd.DataFrame())
        if len(table):
            temporary = self.folder / "statistics.part"
            table.to_parquet(temporary, index=False)
            os.replace(temporary, self.folder / "statistics.parquet")
        return table


def label(time: np.datetime64) -> str:
    """A time as the record's files are named, no longer than it has to be."""
    text = str(time.astype("datetime64[s]")).replace(":", "")
    while text.endswith("00") and len(text) > len("2019-03-27T00"):
        text = text[:-2]
    return text


def statistics(departures: pd.DataFrame) -> pd.DataFrame:
    """Statistics of departures, by time and variable, and by variable over all times.

    Args:
        departures: Columns ``analysis_time, variable, omb, oma, expected_variance``; rows with a
            departure that is not finite are left out, of ``expected_variance`` for ``chi2`` only.

    Returns:
        One row for each variable and time, and one with ``time`` NaT for each variable, last:
        ``count``; ``omb_mean``, ``omb_rms``, ``oma_mean``, ``oma_rms``; Desroziers' estimates
        ``observation_error`` and ``background_error``, standard deviations in the variable's unit
        (NaN if negative, or of fewer than two); ``chi2``, the innovations' reduced chi-square.
    """
    rows = []
    if len(departures):
        by_time = departures.groupby(["analysis_time", "variable"], sort=True)
        rows += [_row(time, variable, part) for (time, variable), part in by_time]
        by_variable = departures.groupby("variable", sort=True)
        rows += [_row(pd.NaT, variable, part) for variable, part in by_variable]
    columns = ["time", "variable", "count", "omb_mean", "omb_rms", "oma_mean", "oma_rms"]
    columns += ["observation_error", "background_error", "chi2"]
    return pd.DataFrame(rows, columns=columns)


def _row(time: object, variable: object, part: pd.DataFrame) -> dict[str, object]:
    oma, omb = (torch.tensor(part[name].to_numpy(float)) for name in ("oma", "omb"))
    row: dict[str, object] = {"time": time, "variable": variable}
    for name, values in (("omb", omb), ("oma", oma)):
        finite = values[values.isfinite()]
        row[f"{name}_mean"] = float(finite.mean())  # NaN of none
        row[f"{name}_rms"] = float(finite.square().mean().sqrt())
        row["count"] = len(finite)
    both = omb.isfinite() & oma.isfinite()
    row["observation_error"] = row["background_error"] = row["chi2"] = math.nan
    if int(both.sum()) > 1:
        estimate = desroziers(omb[both], oma[both])
        for name, value in (
            ("observation_error", estimate.observation),
            ("background_error", estimate.background),
        ):
            row[name] = math.sqrt(value) if value >= 0 else math.nan
    expected = torch.tensor(part["expected_variance"].to_numpy(float))
    known = omb.isfinite() & expected.isfinite()
    if bool(known.any()):
        row["chi2"] = reduced_chi_square(omb[known], expected[known])
    return row
