# SPDX-License-Identifier: Apache-2.0
"""Observations from ECMWF's formats and archives, ready to be assimilated.

Without arguments, eight SYNOP reports (one with a gross error, one without a wind direction) are
encoded as a BUFR file, which is then read like any other. With a file of yours, that is read:

    python examples/03_observations_ecmwf.py
    python examples/03_observations_ecmwf.py --file synop.bufr --time 2018-11-02T12:00
    python examples/03_observations_ecmwf.py --file feedback.odb --time 2017-04-17T12:00
    python examples/03_observations_ecmwf.py --mars ob --time 2019-03-27T12:00    # needs a key

The observations go to ``outputs/observations_ecmwf.csv``.
"""

from __future__ import annotations

import argparse
import sys
from io import StringIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from ddo_modulus.earth2.sources import BufrSource, MarsSource, OdbSource
from ddo_modulus.errors import InputError
from ddo_modulus.observations.table import read_table

OUT = Path("outputs")
VARIABLES = ["t2m", "d2m", "u10m", "v10m", "sp", "msl"]
ALOFT = ["t", "u", "v", "q", "z"]

# Invented: block and number of the station, latitude, longitude, height, temperature, dew point
# (K), wind (degrees, m/s), pressure at the station (Pa).
REPORTS = """\
block,number,lat,lon,height,temperature,dew_point,direction,speed,pressure
3,772,51.48,-0.45,25,285.3,279.1,240,4.1,102480
3,535,52.42,-1.83,97,284.4,278.6,250,5.1,101530
3,334,53.36,-2.28,69,284.0,278.9,260,5.7,101720
3,839,50.74,-3.41,27,284.9,281.0,230,3.6,102390
3,160,55.95,-3.35,41,283.2,277.5,,6.7,101610
3,91,57.20,-2.20,65,282.7,276.9,270,7.2,101200
3,917,54.66,-6.22,68,283.6,279.4,240,6.2,101640
3,969,53.43,-6.25,71,384.1,279.8,235,5.7,101810
"""


def encode_synop(report: pd.Series, time: pd.Timestamp, file: BinaryIO) -> None:
    """Write one report as a BUFR message of the land template 307080."""
    import eccodes

    message = eccodes.codes_bufr_new_from_samples("BUFR4")
    eccodes.codes_set_array(message, "inputDelayedDescriptorReplicationFactor", [1, 1])
    eccodes.codes_set(message, "dataCategory", 0)
    eccodes.codes_set(message, "masterTablesVersionNumber", 31)
    eccodes.codes_set(message, "unexpandedDescriptors", 307080)
    values = {name: getattr(time, name) for name in ("year", "month", "day", "hour", "minute")}
    values |= {
        "blockNumber": int(report["block"]),
        "stationNumber": int(report["number"]),
        "latitude": report["lat"],
        "longitude": report["lon"],
        "heightOfStationGroundAboveMeanSeaLevel": report["height"],
        "nonCoordinatePressure": report["pressure"],
        "airTemperature": report["temperature"],
        "dewpointTemperature": report["dew_point"],
        "windDirection": report["direction"],
        "windSpeed": report["speed"],
        # Of the thermometer, and (the seventh that the template gives) of the anemometer.
        "#1#heightOfSensorAboveLocalGroundOrDeckOfMarinePlatform": 2.0,
        "#7#heightOfSensorAboveLocalGroundOrDeckOfMarinePlatform": 10.0,
    }
    for key, value in values.items():
        if not np.isnan(value):
            whole = key in ("windDirection", *list(values)[:7])
            eccodes.codes_set(message, key, int(value) if whole else float(value))
    eccodes.codes_set(message, "pack", 1)
    eccodes.codes_write(message, file)
    eccodes.codes_release(message)


def main() -> int:
    """Find a file, read it as a source of Earth2Studio, write a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--file", type=Path, help="a BUFR or ODB-2 file of yours")
    what.add_argument("--mars", choices=("ob", "ofb"), help="retrieve reports or feedback")
    parser.add_argument("--time", default="2019-03-27T12:00", help="UTC")
    parser.add_argument("--tolerance", type=int, default=30, help="minutes, either way")
    parser.add_argument("--aloft", action="store_true", help="radiosondes instead of stations")
    options = parser.parse_args()
    console = Console()
    within = {"time_tolerance": np.timedelta64(options.tolerance, "m")}

    if options.mars:
        source = MarsSource(options.mars, **within)
    elif options.file and options.file.suffix == ".odb":
        source = OdbSource(options.file, **within)
    else:
        file = options.file or OUT / "synop.bufr"
        if options.file is None:
            OUT.mkdir(exist_ok=True)
            reports = pd.read_csv(StringIO(REPORTS))
            with file.open("wb") as stream:
                for _, report in reports.iterrows():
                    encode_synop(report, pd.Timestamp(options.time), stream)
            console.print(f"Encoded {len(reports)} invented reports as {file}.")
        source = BufrSource(file, **within)

    try:
        observations = source(np.datetime64(options.time), ALOFT if options.aloft else VARIABLES)
    except InputError as error:
        console.print(f"[red]{error}", soft_wrap=True)
        return 2

    table = Table("variable", "observations", "least", "median", "most", title=options.time)
    for variable, values in observations.groupby("variable")["observation"]:
        low, middle, high = values.quantile([0, 0.5, 1])
        table.add_row(str(variable), f"{len(values):,}", *(f"{v:.6g}" for v in (low, middle, high)))
    console.print(table)

    # What is read is what was reported, gross errors too; the table's checks leave those out.
    checked = read_table(observations)
    for reason, count in checked.dropped.items():
        console.print(f"left out, {reason}: {count}")
    path = OUT / "observations_ecmwf.csv"
    path.parent.mkdir(exist_ok=True)
    checked.frame.to_csv(path, index=False)
    console.print(
        f"See {path}. Next, temperatures over the United Kingdom from these stations:\n"
        f"  ddo assimilate package=uk_t2m observations={path} out=outputs/uk_t2m_ecmwf.zarr",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
