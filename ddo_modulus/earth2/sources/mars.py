# SPDX-License-Identifier: Apache-2.0
"""Observations from ECMWF's archive MARS, through its own client, `ecmwf-api-client`.

Two kinds: reports as they came in (`type=ob`, BUFR) and the feedback of an assimilation
(`type=ofb`, ODB-2: with observation errors and what became of each datum). Either is retrieved
once for a day and kept in the cache. Access to `type=ob` is restricted to ECMWF's member states
and by licence; the feedback of ERA5 (`class=ea`) is open to more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ddo_modulus.earth2.sources.bufr import decode_bufr
from ddo_modulus.earth2.sources.odb import MAGIC, decode_odb
from ddo_modulus.earth2.sources.reports import SCHEMA
from ddo_modulus.earth2.sources.source import (
    HALF_HOUR,
    ObservationSource,
    Tolerance,
    Window,
    needed,
    with_description,
)
from ddo_modulus.errors import InputError

# What MARS calls the kinds of report: `obstype` of reports, `reportype` of feedback.
SYNOP, METAR = 1, 140
_FEEDBACK_REPORTS = {SYNOP: "16001/16002", METAR: "16004"}

_KEY = (
    "set ECMWF_API_URL, ECMWF_API_KEY and ECMWF_API_EMAIL, or write them to ~/.ecmwfapirc as "
    "https://api.ecmwf.int/v1/key/ shows when you are logged in"
)


class MarsSource(ObservationSource):
    """Observations from MARS.

    Args:
        kind: `ob` for reports (BUFR), `ofb` for feedback (ODB-2).
        obstypes: MARS's numbers of the kinds of report: 1 SYNOP, 140 METAR.
        request: Keywords of the request that are to differ: `class`, `expver`, `stream`, `filter`,
            `time`, `obsgroup`, `reportype`, `area` and so on.
        dataset: Name of a public data set, which ECMWF's data server gives without an account for
            MARS; None for MARS itself.
        time_tolerance: See :class:`~ddo_modulus.earth2.sources.source.ObservationSource`.
        cache: Keep the files retrieved and the decoded reports.
        retries: How often to try again, beside the client's own ten tries at each step.
        async_timeout: Seconds; a request may wait in the queue for hours.
    """

    SOURCE_ID = "ddo_modulus.earth2.sources.MarsSource"
    SCHEMA = with_description(
        SCHEMA,
        quality="Of ob: confidence in %, 100 is best; of ofb: datum_status, bits: 1 active, "
        "2 passive, 4 rejected, 8 blacklisted",
    )

    def __init__(
        self,
        kind: Literal["ob", "ofb"] = "ob",
        obstypes: Sequence[int] = (SYNOP,),
        request: Mapping[str, Any] | None = None,
        dataset: str | None = None,
        time_tolerance: Tolerance = HALF_HOUR,
        cache: bool = True,
        retries: int = 3,
        async_timeout: float = 24 * 3600,
    ) -> None:
        super().__init__(time_tolerance, cache, retries, async_timeout)
        if kind not in ("ob", "ofb"):
            raise InputError(f"kind is {kind!r}; MARS has 'ob' (BUFR) and 'ofb' (ODB)")
        if not obstypes:
            raise InputError("obstypes is empty; give at least one, as 1 for SYNOP")
        unknown = [number for number in obstypes if number not in _FEEDBACK_REPORTS]
        if kind == "ofb" and unknown and "reportype" not in (request or {}):
            raise InputError(
                f"the feedback's reportype of obstype {unknown} is not known here; give it as "
                "request={'reportype': ...}"
            )
        self.kind = kind
        self.obstypes = tuple(obstypes)
        self.dataset = dataset
        self._changes = dict(request or {})

    @property
    def _where(self) -> str:
        return f"MARS, type={self.kind}"

    @property
    def _is_whole(self) -> bool:
        return False

    def requests(self, windows: Sequence[Window]) -> list[dict[str, Any]]:
        """What is asked of MARS: one request for each day.

        Args:
            windows: Pairs of times.
        """
        days = {
            day
            for start, end in windows
            for day in pd.date_range(pd.Timestamp(start).normalize(), end, freq="D")
        }
        if self.kind == "ob":
            common = {"class": "od", "expver": "1", "stream": "oper", "type": "ob"}
            common |= {"repres": "bu", "obstype": "/".join(map(str, self.obstypes))}
            common |= {"time": "0000", "range": "1439"}  # minutes: the whole day
        else:
            common = {"class": "ea", "expver": "1", "stream": "oper", "type": "ofb"}
            reports = [_FEEDBACK_REPORTS.get(number, "") for number in self.obstypes]
            common |= {"obsgroup": "conv", "reportype": "/".join(reports)}
            common |= {"time": "00/06/12/18"}
            # The analysis of the evening before has seen the first hours of a day.
            days |= {day - pd.Timedelta("1D") for day in days}
        if self.dataset:
            common["dataset"] = self.dataset
        return [common | {"date": f"{day:%Y-%m-%d}"} | self._changes for day in sorted(days)]

    def _load(self, windows: Sequence[Window], variables: list[str]) -> pd.DataFrame:
        rows = [self._decoded(self._file(r), variables) for r in self.requests(windows)]
        return pd.concat(rows, ignore_index=True).drop_duplicates(ignore_index=True)

    def _file(self, request: dict[str, Any]) -> Path:
        """The file that answers a request, from the cache or from MARS."""
        key = json.dumps(request, sort_keys=True)
        return self._kept(key, f".{self.kind}", lambda part: self._retrieve(request, part))

    def _retrieve(self, request: dict[str, Any], target: Path) -> None:
        api = needed("ecmwfapi.api")
        try:
            credentials = api.get_apikey_values()
        except (api.APIKeyFetchError, api.APIKeyNotFoundError) as error:
            raise InputError(f"the ECMWF key cannot be used ({error}); {_KEY}") from error
        if tuple(credentials) == tuple(api.ANONYMOUS_APIKEY_VALUES):
            raise InputError(f"no ECMWF key; {_KEY}")
        client = needed("ecmwfapi")
        try:
            if self.dataset:
                client.ECMWFDataServer(log=_quiet).retrieve(request | {"target": str(target)})
            else:
                client.ECMWFService("mars", log=_quiet).execute(request, str(target))
        except api.APIException as error:
            raise InputError(
                f"MARS refuses the request {request} ({error}). If it is about access: reports "
                "(type=ob) are restricted; ask ECMWF, or use the feedback, kind='ofb'"
            ) from error
        if not target.is_file() or not target.stat().st_size:
            raise InputError(f"MARS has nothing for the request {request}; change it")

    def _decoded(self, path: Path, variables: Sequence[str]) -> pd.DataFrame:
        """All observations in a file of either format, told by its first bytes."""
        with path.open("rb") as file:
            is_odb = file.read(len(MAGIC)) == MAGIC
        if is_odb:
            return decode_odb(path, variables, self._kept_frame)
        return decode_bufr(path, variables, self._kept_frame)


def _quiet(message: str) -> None:
    """Take the client's log, which is of no use to a caller of a source."""
