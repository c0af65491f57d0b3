# SPDX-License-Identifier: Apache-2.0
"""Workflows with Earth2Studio's own parts, and with models whose cycles are computed by hand."""

import json
from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

pytest.importorskip("earth2studio")

from earth2studio.io import KVBackend, ZarrBackend

from ddo_modulus.earth2.feedback import statistics
from ddo_modulus.earth2.record import label
from ddo_modulus.earth2.run import RecordFolder, assimilation, cycle
from ddo_modulus.errors import InputError

LAT, LON = np.arange(52.0, 48.0, -1.0), np.arange(0.0, 5.0)
TIMES = np.datetime64("2019-03-27T00", "ns") + np.arange(4) * np.timedelta64(6, "h")


class Stations:
    """A source with a thermometer at each grid point: one value each time, or as listed."""

    SCHEMA = None

    def __init__(self, values=(280.0, 282.0, 284.0, 286.0), empty=(), without=()):
        self.values = dict(zip(TIMES, values, strict=True))
        self.empty, self.without, self.calls = empty, list(without), []

    def __call__(self, time, variable, fields=None):
        (when,) = np.asarray(time, "datetime64[ns]")
        self.calls.append(when)
        lat, lon = (a.ravel() for a in np.meshgrid(LAT, LON, indexing="ij"))
        frame = pd.DataFrame(
            {
                "time": when,
                "lat": lat,
                "lon": lon,
                "observation": self.values[when],
                "variable": "t2m",
                "observation_error": 1.0,
            }
        ).drop(columns=self.without)
        return frame[:0] if when in self.empty else frame


class Nudging(torch.nn.Module):
    """Analysis = background + gain (observation - background), point by point, for each member.

    Without a background it starts from ``first``, with members ``offsets`` about it.
    """

    def __init__(
        self, gain=0.5, first=270.0, offsets=None, axes=("ensemble", "time"), fail_at=None
    ):
        super().__init__()
        self.axes = axes
        self.gain, self.first, self.offsets = gain, first, offsets
        self.fail_at, self.calls, self.backgrounds = fail_at, 0, []

    def init_coords(self):
        return None

    def input_coords(self):
        names = ("time", "lat", "lon", "observation")
        table = OrderedDict({**{n: np.empty(0) for n in names}, "variable": np.array(["t2m"])})
        return (table, *self.output_coords((table,), np.empty(0)))

    def output_coords(self, input_coords, request_time):
        grid = {"variable": np.array(["t2m"]), "lat": LAT, "lon": LON}
        lead = {"time": request_time}
        if self.offsets is not None:
            members = np.arange(len(self.offsets))
            lead = {axis: lead.get(axis, members) for axis in self.axes}
        return (OrderedDict({**lead, **grid}),)

    def __call__(self, obs, background=None):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        (coords,) = self.output_coords(self.input_coords(), obs.attrs["request_time"])
        self.backgrounds.append(background)
        shape = [len(v) for v in coords.values()]
        x = xr.DataArray(np.full(shape, self.first, np.float32), coords, list(coords))
        if background is not None:
            assert background.dims == x.dims
            x = x.copy(data=background.values)
        elif self.offsets is not None:
            (axis,) = set(self.axes) - {"time"}
            x = x + xr.DataArray(np.asarray(self.offsets, np.float32), dims=[axis])
        y = obs["observation"].to_numpy(np.float32).reshape(len(LAT), len(LON))
        return (x + np.float32(self.gain) * (y - x),)


class Blind(Nudging):
    """One that asks for no background."""

    def input_coords(self):
        return super().input_coords()[:1]


class Fields:
    """A data source: a constant for each variable, plus the hour of the day."""

    def __init__(self, values, lat=LAT, lon=LON):
        self.values, self.lat, self.lon = values, lat, lon

    def __call__(self, time, variable):
        time = np.asarray(time, "datetime64[ns]")
        hour = time.astype("datetime64[h]").astype(int) % 24
        level = np.array([self.values[str(v)] for v in variable])
        x = level[None, :, None, None] + hour[:, None, None, None]
        x = np.broadcast_to(x, (len(time), len(variable), len(self.lat), len(self.lon)))
        coords = {"time": time, "variable": variable, "lat": self.lat, "lon": self.lon}
        return xr.DataArray(x.astype(np.float32), coords, list(coords))


class Steady:
    """Earth2Studio's Persistence without its imports (all of its models, half a minute)."""

    def __init__(self, variables=("t2m",), lat=LAT, lon=LON, history=1, dt=6):
        self.dt, self.history = np.timedelta64(dt, "h"), history
        self.domain = OrderedDict({"variable": np.array(variables), "lat": lat, "lon": lon})

    def to(self, device):
        return self

    def input_coords(self):
        lead = -self.dt * np.arange(self.history)[::-1]
        return OrderedDict({"batch": np.empty(0), "lead_time": lead, **self.domain})

    def output_coords(self, input_coords):
        lead = input_coords["lead_time"][-1:] + self.dt
        return OrderedDict({**input_coords, "lead_time": lead})

    def create_iterator(self, x, coords):
        axis = list(coords).index("lead_time")
        while True:
            coords = OrderedDict({**coords, "lead_time": coords["lead_time"][-1:]})
            x = x.narrow(axis, x.shape[axis] - 1, 1)
            yield x, coords
            coords = self.output_coords(coords)


def persistence(*arguments, **options):
    return Steady(*arguments, **options)


def run(workflow, *arguments, **options):
    return workflow(*arguments, **options, verbose=False, device=torch.device("cpu"))


def test_each_time_is_analysed_by_itself_and_recorded(tmp_path):
    io = ZarrBackend(str(tmp_path / "a.zarr"))
    run(assimilation, TIMES, Nudging(gain=1.0), Stations(), io)
    expected = np.array([280.0, 282.0, 284.0, 286.0])[:, None, None]
    np.testing.assert_array_equal(io["t2m"][:], np.broadcast_to(expected, (4, 4, 5)))
    assert io["time"][:].astype("datetime64[ns]").tolist() == TIMES.astype("int64").tolist()
    feedback = pd.read_parquet(tmp_path / "a.record" / "departures")
    assert len(feedback) == 80 and (feedback["oma"].abs() < 1e-4).all()
    assert feedback["omb"].isna().all()  # there is no background
    table = pd.read_parquet(tmp_path / "a.record" / "statistics.parquet")
    assert len(table) == 5 and table["time"].isna().sum() == 1


@pytest.mark.slow
def test_earth2studios_own_models_cycle():
    from earth2studio.models.da import InterpEquirectangular
    from earth2studio.models.px import Persistence

    domain = OrderedDict({"lat": LAT, "lon": LON})
    io = KVBackend()
    run(cycle, TIMES, Persistence("t2m", domain), Nudging(), Stations(), io)
    np.testing.assert_allclose(io["t2m"][:, 0, 0], [275.0, 278.5, 281.25, 283.625])
    pytest.importorskip("cupy", reason="Earth2Studio's interpolation is for CUDA")
    model = InterpEquirectangular(LAT, LON, interp_method="nearest")
    io = KVBackend()
    run(assimilation, TIMES, model, Stations(), io)
    assert io["t2m"][:, 0, 0].tolist() == [280.0, 282.0, 284.0, 286.0]


def test_cycle_is_the_recursion_by_hand(tmp_path):
    io = ZarrBackend(str(tmp_path / "c.zarr"))
    model = Nudging(gain=0.5, first=270.0)
    run(cycle, TIMES, persistence(), model, Stations(), io, keep_background=True)
    analyses, backgrounds, x = [], [], 270.0
    for y in (280.0, 282.0, 284.0, 286.0):
        backgrounds.append(x)
        x = x + 0.5 * (y - x)
        analyses.append(x)
    np.testing.assert_allclose(io["t2m"][:, 1, 2], analyses)
    np.testing.assert_allclose(io["t2m_background"][1:, 1, 2], backgrounds[1:])
    assert model.backgrounds[0] is None and model.backgrounds[1]["time"].values[0] == TIMES[1]
    feedback = pd.read_parquet(tmp_path / "c.record" / "departures")
    last = feedback[feedback["analysis_time"] == TIMES[3]]
    np.testing.assert_allclose(last["omb"], 286 - backgrounds[3])
    np.testing.assert_allclose(last["oma"], 286 - analyses[3])
    table = pd.read_parquet(tmp_path / "c.record" / "statistics.parquet")
    assert table["chi2"].isna().all()  # one member tells nothing of its error


def test_several_steps_lie_between_analyses():
    io = KVBackend()
    model = Nudging()
    run(cycle, TIMES, persistence(dt=3), model, Stations(), io)
    assert [b["time"].values[0] for b in model.backgrounds[1:]] == list(TIMES[1:])


@pytest.mark.parametrize(("batch", "axes"), [(None, ("ensemble", "time")), (2, ("time", "sample"))])
def test_members_stay_apart_and_give_the_innovations_expectation(tmp_path, batch, axes):
    offsets = np.array([-2.0, 0.0, 2.0])
    io = ZarrBackend(str(tmp_path / "e.zarr"))
    model = Nudging(offsets=offsets, axes=axes)
    run(cycle, TIMES[:2], persistence(), model, Stations(), io, batch_size=batch)
    fields = io["t2m"][:] if axes[0] == "ensemble" else io["t2m"][:].swapaxes(0, 1)
    assert fields.shape == (3, 2, 4, 5)
    first = 270 + offsets + 0.5 * (280 - 270 - offsets)
    np.testing.assert_allclose(fields[:, 0, 0, 0], first)
    second = first + 0.5 * (282 - first)
    np.testing.assert_allclose(fields[:, 1, 3, 4], second)
    frame = pd.read_parquet(tmp_path / "e.record" / "departures" / f"{label(TIMES[1])}.parquet")
    np.testing.assert_allclose(frame["omb"], 282 - 275)
    np.testing.assert_allclose(frame["background_spread"], 1.0)
    np.testing.assert_allclose(frame["expected_variance"], 1 + 4 / 3)
    row = statistics(frame).iloc[-1]
    assert row["chi2"] == pytest.approx(49 / (1 + 4 / 3))


@pytest.mark.parametrize("workflow", ["assimilation", "cycle"])
def test_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path, workflow):
    def start(name, **options):
        io = ZarrBackend(str(tmp_path / f"{name}.zarr"))
        model = Nudging(offsets=[-1.0, 1.0], axes=("time", "sample"), **options)
        arguments = (TIMES, persistence(), model) if workflow == "cycle" else (TIMES, model)
        run(cycle if workflow == "cycle" else assimilation, *arguments, Stations(), io)
        return io, model

    whole, _ = start("whole")
    with pytest.raises(KeyboardInterrupt):
        start("cut", fail_at=3)
    assert len(json.loads((tmp_path / "cut.record" / "state.json").read_text())["done"]) == 2
    cut, model = start("cut")
    assert model.calls == 2
    np.testing.assert_array_equal(cut["t2m"][:], whole["t2m"][:])
    one, other = (
        pd.read_parquet(tmp_path / f"{n}.record/statistics.parquet") for n in ("cut", "whole")
    )
    pd.testing.assert_frame_equal(one, other)
    assert len(list((tmp_path / "cut.record").glob("state-*.npz"))) == (workflow == "cycle")
    _, model = start("cut")
    assert model.calls == 0  # complete: nothing is done again


def test_analysis_replaces_what_it_covers_and_no_more():
    lat, lon = np.arange(54.0, 46.0, -1.0), np.arange(0.0, 360.0)
    io = KVBackend()
    prognostic = persistence(("t2m", "msl"), lat, lon)
    taken = {}
    iterate = prognostic.create_iterator

    def watch(x, coords):
        taken["x"] = x.clone()
        return iterate(x, coords)

    prognostic.create_iterator = watch
    data = Fields({"t2m": 270.0, "msl": 1e5}, lat, lon)
    run(cycle, TIMES[:2], prognostic, Nudging(), Stations(), io, data=data)
    state = taken["x"][0, 0, 0]
    np.testing.assert_allclose(state[0, 2:6, :5], 275.0)  # from 270 half-way to 280
    assert float(state[0].sum()) == pytest.approx(270 * state[0].numel() + 5 * 20)
    assert (state[1] == 1e5).all()
    np.testing.assert_allclose(io["t2m"][1], 278.5)


def test_models_with_a_history_get_it():
    io = KVBackend()
    prognostic = persistence(history=2)
    taken = []
    iterate = prognostic.create_iterator
    prognostic.create_iterator = lambda x, c: (taken.append(x[0, 0, :, 0, 0, 0]), iterate(x, c))[1]
    run(cycle, TIMES[:3], prognostic, Nudging(), Stations(), io, data=Fields({"t2m": 260.0}))
    assert taken[0].tolist() == [278.0, 270.0]  # 18 h the day before; 0 h, half-way to 280
    assert taken[1].tolist() == [270.0, 276.0]
    with pytest.raises(InputError, match="give data="):
        run(cycle, TIMES[:2], persistence(history=2), Nudging(), Stations(), KVBackend())


def test_time_without_observations_keeps_its_background(tmp_path):
    io = ZarrBackend(str(tmp_path / "g.zarr"))
    run(cycle, TIMES[:3], persistence(), Nudging(), Stations(empty=TIMES[1:2]), io)
    assert io["t2m"][1, 0, 0] == io["t2m"][0, 0, 0]
    assert len(list((tmp_path / "g.record" / "departures").iterdir())) == 2


def test_background_of_a_source_goes_to_models_that_take_one():
    io, model = KVBackend(), Nudging()
    run(assimilation, TIMES[:2], model, Stations(), io, background=Fields({"t2m": 270.0}))
    assert [float(b.mean()) for b in model.backgrounds] == [270.0, 276.0]
    np.testing.assert_allclose(io["t2m"][:, 0, 0], [275.0, 279.0])


def test_models_that_ask_for_no_background_get_none():
    io, model = KVBackend(), Blind()
    run(cycle, TIMES[:2], persistence(), model, Stations(), io)
    assert model.backgrounds == [None, None]
    np.testing.assert_allclose(io["t2m"][:, 0, 0], [275.0, 276.0])


def test_part_of_the_domain_can_be_kept():
    io = KVBackend()
    box = OrderedDict({"lat": LAT[1:3], "lon": LON[:2]})
    run(assimilation, TIMES[:1], Nudging(), Stations(), io, output_coords=box)
    assert io["t2m"].shape == (1, 2, 2)


def test_mistakes_are_refused_before_the_work(tmp_path):
    def refuse(words, workflow=assimilation, time=TIMES, model=None, source=None, io=None, **more):
        model = Nudging() if model is None else model
        first = (time, persistence()) if workflow is cycle else (time,)
        with pytest.raises(InputError, match=words):
            run(
                workflow,
                *first,
                model,
                source or Stations(),
                KVBackend() if io is None else io,
                **more,
            )

    refuse("ascend", time=TIMES[::-1])
    refuse("ascend", time=[])
    refuse("takes 1 table", source=[Stations(), Stations()])
    refuse("no observations at 2019-03-27T06", source=Stations(empty=TIMES[1:2]))
    refuse("no observations", workflow=cycle, source=Stations(empty=TIMES[:1]))
    refuse("no column lat", source=Stations(without=["lat"]))
    refuse(
        "whole number of steps",
        workflow=cycle,
        time=[TIMES[0], TIMES[0] + np.timedelta64(5, "h")],
    )
    carrying = Nudging()
    carrying.init_coords = lambda: (OrderedDict(),)
    refuse("generator", model=carrying)

    io = ZarrBackend(str(tmp_path / "x.zarr"))
    run(assimilation, TIMES, Nudging(), Stations(), io)
    refuse("record of another run", time=TIMES[:2], io=ZarrBackend(str(tmp_path / "x.zarr")))
    refuse("already holds t2m", io=ZarrBackend(str(tmp_path / "x.zarr")), record=None)
    with pytest.raises(KeyboardInterrupt):
        run(
            assimilation,
            TIMES,
            Nudging(fail_at=2),
            Stations(),
            ZarrBackend(str(tmp_path / "y.zarr")),
        )
    fresh = ZarrBackend(str(tmp_path / "y.zarr"), backend_kwargs={"overwrite": True})
    refuse(r"store holds none; record=RecordFolder\('.*y.record', overwrite=True\)", io=fresh)
    run(assimilation, TIMES, Nudging(), Stations(), fresh, record=RecordFolder(overwrite=True))
    (tmp_path / "z.record").mkdir()
    (tmp_path / "z.record" / "mine.txt").touch()
    refuse("is no record", io=ZarrBackend(str(tmp_path / "z.zarr")))


def test_grids_that_do_not_share_points_are_refused():
    other = persistence(lat=LAT + 0.5)
    with pytest.raises(InputError, match="no lat 52"):
        run(cycle, TIMES[:2], other, Nudging(), Stations(), KVBackend())


def test_values_that_an_analysis_leaves_open_are_the_backgrounds():
    class Holes(Nudging):
        def __call__(self, obs, background=None):
            (analysis,) = super().__call__(obs, background)
            analysis.values[..., 0] = np.nan
            return analysis

    io = KVBackend()
    run(
        cycle,
        TIMES[:2],
        persistence(),
        Holes(),
        Stations(),
        io,
        data=Fields({"t2m": 270.0}),
        keep_background=True,
    )
    assert (io["t2m_background"][1, :, 0] == 270.0).all()
    assert (io["t2m_background"][1, :, 1:] == 275.0).all()
    with pytest.raises(InputError, match="leaves values open"):
        run(cycle, TIMES[:2], persistence(), Holes(), Stations(), KVBackend())


@pytest.mark.parametrize("workflow", [assimilation, cycle])
def test_a_record_in_a_folder_of_its_own_is_replaced_on_request(tmp_path, workflow):
    folder = tmp_path / "kept"
    first = (persistence(),) if workflow is cycle else ()

    def start(times, record):
        run(workflow, times, *first, Nudging(), Stations(), KVBackend(), record=record)
        return json.loads((folder / "state.json").read_text())["done"]

    assert len(start(TIMES, folder)) == 4
    with pytest.raises(InputError, match=r"replace it by record=RecordFolder\('.*kept', overwrite"):
        start(TIMES[:2], str(folder))
    assert len(start(TIMES[:2], RecordFolder(folder, overwrite=True))) == 2


@pytest.mark.parametrize(
    ("match", "make"),
    [
        ("record=True must be a folder, 'beside', None or a RecordFolder", lambda: True),
        ("record={'path': 'x'} must be a folder", lambda: {"path": "x"}),
        ("overwrite='yes' must be True or False", lambda: RecordFolder(overwrite="yes")),
    ],
)
def test_records_that_cannot_be(match, make):
    with pytest.raises(InputError, match=match):
        run(assimilation, TIMES, Nudging(), Stations(), KVBackend(), record=make())
