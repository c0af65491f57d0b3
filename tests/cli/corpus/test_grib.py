# SPDX-License-Identifier: Apache-2.0
"""GRIB files as servers send them: in bulletins, cut short, on levels and in units of all kinds."""

import eccodes
import numpy as np
import pytest

from ddo_modulus.data.source import check_values, open_dataset, reading_notes
from ddo_modulus.errors import InputError

ROWS, COLUMNS = 5, 7
GRID = {
    "Ni": COLUMNS,
    "Nj": ROWS,
    "latitudeOfFirstGridPointInDegrees": 55,
    "longitudeOfFirstGridPointInDegrees": 0,
    "latitudeOfLastGridPointInDegrees": 53,
    "longitudeOfLastGridPointInDegrees": 3,
    "iDirectionIncrementInDegrees": 0.5,
    "jDirectionIncrementInDegrees": 0.5,
}


def message(hour, base=280.0, name="2t", level=None, kind=None, edition=1, step=0, seed=None):
    """One GRIB message, at an hour of 2019-03-01."""
    sample = f"regular_ll_{'sfc' if level is None else 'pl'}_grib{edition}"
    handle = eccodes.codes_grib_new_from_samples(sample)
    keys = {**GRID, "dataDate": 20190301, "dataTime": 100 * hour, "shortName": name}
    if kind is not None:
        keys["typeOfLevel"] = kind
    if level is not None:
        keys["level"] = level
    if step:
        keys["step"] = step
    for key, value in keys.items():
        eccodes.codes_set(handle, key, value)
    random = np.random.default_rng(hour if seed is None else seed)
    values = base * (1 + 0.001 * random.standard_normal(ROWS * COLUMNS))
    eccodes.codes_set_values(handle, values)
    content = eccodes.codes_get_message(handle)
    eccodes.codes_release(handle)
    return content


def messages(**keys):
    return [message(hour, **keys) for hour in (0, 6, 12, 18)]


def bulletin(content):
    return b"\x01\r\r\n123 \r\r\nHTXA90 KWBC 010000\r\r\n" + content + b"\r\r\n\x03"


def saved(path, content):
    path.write_bytes(content)
    return path


WRAPPED = {
    "plain": b"".join,
    "in bulletins": lambda parts: b"".join(map(bulletin, parts)),
    "with trailers": lambda parts: b"".join(part + b"\r\r\n\x03" for part in parts),
    "with a newline at the end": lambda parts: b"".join(parts) + b"\n",
    "padded with zeros": lambda parts: b"".join(part + bytes(64) for part in parts),
    "after a long header": lambda parts: b"-" * 2000 + b"".join(parts),
    "one of them twice": lambda parts: b"".join([*parts, parts[0]]),
}


@pytest.mark.parametrize("edition", [1, 2])
@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_what_stands_between_messages_is_no_fault(tmp_path, wrapped, edition):
    path = saved(tmp_path / "x.grib", wrapped(messages(edition=edition)))
    dataset = open_dataset(path)
    check_values(dataset, str(path))
    assert dict(dataset.sizes) == {"time": 4, "lat": ROWS, "lon": COLUMNS}
    assert dataset["t2m"].mean() == pytest.approx(280.0, abs=1.0)


DAMAGED = {
    "the last without its end": lambda parts: b"".join(parts)[:-30],
    "the second without its end": lambda parts: parts[0] + parts[1][:-60] + parts[2],
    "the first without its end": lambda parts: parts[0][:-60] + parts[1],
    "the second without its start": lambda parts: parts[0] + parts[1][60:] + parts[2],
    "the first without its start": lambda parts: parts[0][60:] + parts[1],
    "half of one": lambda parts: parts[0][: len(parts[0]) // 2],
}


@pytest.mark.parametrize("edition", [1, 2])
@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
def test_a_part_of_a_message_is_refused(tmp_path, damaged, edition, capfd):
    path = saved(tmp_path / "x.grib", damaged(messages(edition=edition)))
    with pytest.raises(InputError, match=r"x.grib: cannot be read, damaged or cut short .*whole"):
        open_dataset(path)
    assert capfd.readouterr().err == "", "the library printed a line of its own"


def test_prepare_refuses_a_file_cut_in_the_middle(refusal, tmp_path):
    first, second, third, _ = messages()
    path = saved(tmp_path / "x.grib", first + second[:-60] + third)
    refusal("prepare", f"{path}: cannot be read, damaged", source=path, out=tmp_path / "o.zarr")


KINDS = [
    # keys of the messages, id, mean in the lexicon's units, whether it is converted
    ({"name": "u", "level": 100, "base": 30.0}, "u100", 30.0, False),
    ({"name": "u", "level": 10, "base": 30.0}, "u10", 30.0, False),
    ({"name": "10u", "base": 5.0}, "u10m", 5.0, False),
    ({"name": "100u", "base": 5.0, "edition": 2}, "u100m", 5.0, False),
    ({"name": "z", "level": 500, "base": 55000.0}, "z500", 55000.0, False),
    ({"name": "gh", "level": 500, "base": 5600.0}, "z500", 5600.0 * 9.80665, True),
    ({"name": "r", "level": 700, "base": 50.0}, "r700", 50.0, False),
    ({"name": "q", "level": 700, "base": 0.004}, "q700", 0.004, False),
    ({"name": "w", "level": 500, "base": 0.1}, "w500", 0.1, False),
    ({"name": "tcc", "base": 0.5}, "tcc", 0.5, False),
    ({"name": "msl", "base": 101000.0}, "msl", 101000.0, False),
    ({"name": "tp", "base": 0.001}, "tp", 0.001, False),
    ({"name": "tcwv", "base": 20.0}, "tcwv", 20.0, False),
    ({"name": "sst", "base": 285.0}, "sst", 285.0, False),
]


@pytest.mark.parametrize(("keys", "variable", "mean", "converted"), KINDS)
def test_variables_have_their_ids_and_units(tmp_path, keys, variable, mean, converted):
    path = saved(tmp_path / "x.grib", b"".join(messages(**keys)))
    dataset = open_dataset(path)
    check_values(dataset, str(path))
    assert list(dataset) == [variable]
    assert float(dataset[variable].mean()) == pytest.approx(mean, rel=2e-3)
    assert bool(reading_notes(dataset)) == converted


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"name": "t", "level": 100, "kind": "hybrid", "base": 220.0}, "model levels"),
        ({"name": "t", "level": 320, "kind": "theta", "base": 220.0}, "potential temperatures"),
        ({"name": "t", "level": 80, "kind": "heightAboveGround", "base": 280.0}, "heights in m"),
    ],
)
def test_levels_that_are_no_pressures_are_refused(tmp_path, keys, words):
    path = saved(tmp_path / "x.grib", b"".join(messages(**keys)))
    with pytest.raises(InputError, match=rf"x.grib: t lies on .*{words}"):
        open_dataset(path)


def test_messages_that_contradict_each_other_are_refused(tmp_path):
    path = saved(tmp_path / "x.grib", b"".join([*messages(), message(0, seed=9)]))
    with pytest.raises(InputError, match="x.grib: only 4 of its 5 GRIB messages can be read"):
        open_dataset(path)


def test_runs_and_steps_are_refused(tmp_path):
    parts = [message(hour, step=step) for hour in (0, 6) for step in (0, 6)]
    path = saved(tmp_path / "x.grib", b"".join(parts))
    with pytest.raises(InputError, match="x.grib: runs and forecast steps both vary"):
        open_dataset(path)


def test_a_wind_at_100_hpa_goes_through_prepare(accepted, tmp_path):
    path = saved(tmp_path / "x.grib", b"".join(messages(name="u", level=100, base=30.0)))
    accepted("prepare", source=path)
    assert list(open_dataset(tmp_path / "out.zarr")) == ["u100"]
