# SPDX-License-Identifier: Apache-2.0
"""Observations from ECMWF's archive MARS, through its own client, `ecmwf-api-client`.

MARS has observations as received (`type=ob`, BUFR) and as feedback of an assimilation (`type=ofb`,
ODB-2), which adds observation errors and the status of each datum. Both are retrieved by the day
and cached. Access to `type=ob` is restricted to ECMWF's member states and licence holders; more
users have access to the feedback of ERA5 (`class=ea`).
"""

from __future__ import annotations

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
    days_of,
    needed,
    with_description,
)
from ddo_modulus.errors import InputError

# MARS's numbers for kinds of report: `obstype` for reports, `reportype` for feedback.
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
        obstypes: MARS's numbers for the kinds of report: 1 SYNOP, 140 METAR.
        request: Keywords to add to the request or to replace in it: `class`, `expver`, `stream`,
            `filter`, `time`, `obsgroup`, `reportype`, `area` and so on.
        dataset: Name of a public data set, which ECMWF's data server offers without a MARS
            account; None for MARS itself.
        time_tolerance: See :class:`~ddo_modulus.earth2.sources.source.ObservationSource`.
        cache: Keep the retrieved files and the decoded reports.
        retries: How often to retry after an error of the connection, in addition to the client's
            own ten tries at each step.
        async_timeout: Time limit of a call, in seconds; a request may be queued for hours.

    Raises:
        InputError: If `kind` is unknown, `obstypes` is empty, or the feedback's number of an
            obstype is unknown and not in `request`.
    """

    SOURCE_ID = "ddo_modulus.earth2.sources.MarsSource"
    SCHEMA = with_description(
        SCHEMA,
        quality="For ob: confidence in %, 100 is best; for ofb: datum_status, bits: 1 active, "
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
            raise InputError("obstypes is empty; give at least one, e.g. 1 for SYNOP")
        unknown = [number for number in obstypes if number not in _FEEDBACK_REPORTS]
        if kind == "ofb" and unknown and "reportype" not in (request or {}):
            raise InputError(
                f"the feedback's reportype of obstype {unknown} is unknown; give it as "
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
        """The requests to MARS, one for each day.

        Args:
            windows: Pairs of times: start and end.

        Returns:
            Keywords of each request, by day.
        """
        days = days_of(windows)
        if self.kind == "ob":
            common = {"class": "od", "expver": "1", "stream": "oper", "type": "ob"}
            common |= {"repres": "bu", "obstype": "/".join(map(str, self.obstypes))}
            common |= {"time": "0000", "range": "1439"}  # minutes: the whole day
        else:
            common = {"class": "ea", "expver": "1", "stream": "oper", "type": "ofb"}
            reports = [_FEEDBACK_REPORTS.get(number, "") for number in self.obstypes]
            common |= {"obsgroup": "conv", "reportype": "/".join(reports)}
            common |= {"time": "00/06/12/18"}
            # The last analysis of the day before assimilated the first hours of a day.
            days |= {day - pd.Timedelta("1D") for day in days}
        if self.dataset:
            common["dataset"] = self.dataset
        return [common | {"date": f"{day:%Y-%m-%d}"} | self._changes for day in sorted(days)]

    def _load(self, windows: Sequence[Window], variables: list[str]) -> pd.DataFrame:
        files = [
            self._retrieved(request, f".{self.kind}", self._retrieve)
            for request in self.requests(windows)
        ]
        rows = [self._decoded(file, variables) for file in files]
        return pd.concat(rows, ignore_index=True).drop_duplicates(ignore_index=True)

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
                f"MARS refuses the request {request} ({error}). If you lack access: reports "
                "(type=ob) are restricted; ask ECMWF, or use the feedback, kind='ofb'"
            ) from error
        if not target.is_file() or not target.stat().st_size:
            raise InputError(f"MARS has no data for the request {request}; change it")

    def _decoded(self, path: Path, variables: Sequence[str]) -> pd.DataFrame:
        """All observations in a file; its first bytes tell ODB-2 from BUFR."""
        with path.open("rb") as file:
            is_odb = file.read(len(MAGIC)) == MAGIC
        if is_odb:
            return decode_odb(path, variables, self._kept_frame)
        return decode_bufr(path, variables, self._kept_frame)


def _quiet(message: str) -> None:
    """Discard the client's log."""
