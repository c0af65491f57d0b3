# SPDX-License-Identifier: Apache-2.0
"""Training data as one object: what is split, cropped and read belongs together."""

from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from ddo_modulus.data.loader import BatchOptions
from ddo_modulus.data.training_store import write_training_store
from ddo_modulus.diffusion.task import Task
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis
from ddo_modulus.training import TrainingData
from ddo_modulus.training.recipe import DataConfig, NormalizationConfig, Recipe, ValidationConfig

CLIMATOLOGY = NormalizationConfig(per_hour=True, per_point=True, harmonics=1, common_scale=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Ten days of two variables every six hours on a region of 6 x 8 points."""
    time = pd.date_range("2020-01-01", periods=40, freq="6h")
    axes = {"time": time, "lat": np.arange(56.0, 50.0, -1), "lon": np.arange(-5.0, 3.0)}
    random = np.random.default_rng(0)
    shape = tuple(len(v) for v in axes.values())
    fields = {
        name: (tuple(axes), random.standard_normal(shape).astype("f4"), {"units": unit})
        for name, unit in {"t2m": "K", "u10m": "m/s"}.items()
    }
    fields["t2m"][1][:] += 280
    dataset = xr.Dataset(fields, axes, {"title": "made", "history": "long"})
    return write_training_store(dataset, tmp_path_factory.mktemp("data") / "x.zarr", "here")


FRAME = Task()


def opened(store, task=FRAME, normalization=CLIMATOLOGY, **options):
    config = DataConfig(store, **options)
    return TrainingData.open(config, domain="box", task=task, normalization=normalization)


def test_climatology_is_of_the_training_samples_alone(store):
    held_back = ValidationConfig(start="2020-01-08", end="2020-01-09T18")
    data = opened(store, end="2020-01-09T18", validation=held_back)
    training, validation = data.split()
    assert (len(data.samples), len(training.samples), len(validation.samples)) == (36, 28, 8)
    assert validation.normalization is training.normalization
    expected = opened(store, end="2020-01-07T18")
    assert torch.equal(training.normalization.mean, expected.normalization.mean)
    everything = opened(store, end="2020-01-09T18")
    assert torch.equal(data.refitted().normalization.mean, everything.normalization.mean)
    assert not torch.equal(everything.normalization.mean, expected.normalization.mean)
    assert data.units == ("K", "m/s") and data.attributes["title"] == "made"
    assert "history" not in data.attributes


def test_folds_are_every_sample_once_and_never_with_the_others(store):
    data = opened(store)
    blocks = []
    for others, block in data.folds(3):
        assert not set(others.samples.times) & set(block.samples.times)
        assert len(others.samples) + len(block.samples) == 40
        assert block.normalization is others.normalization is data.normalization
        blocks.append(block.samples.times)
    np.testing.assert_array_equal(np.concatenate(blocks), data.samples.times)


@pytest.mark.parametrize("loader", ["memory", "torch"])
def test_a_crop_takes_samples_statistics_and_grid_alike(store, loader):
    whole, data = opened(store, loader=loader), opened(store, loader=loader, crop=(4, 5))
    cropped = data.cropped()
    rows, columns = slice(1, 5), slice(1, 6)
    assert cropped.grid.lat.tolist() == whole.grid.lat[rows].tolist()
    assert cropped.grid.lon.tolist() == whole.grid.lon[columns].tolist()
    basis, everywhere = CosineBasis((4, 5), (1.0, 1.0)), CosineBasis((6, 8), (1.0, 1.0))
    x, _ = data.tensors(basis, None, "cpu")
    expected, _ = whole.tensors(everywhere, None, "cpu")
    torch.testing.assert_close(x, expected[..., rows, columns])
    again, _ = cropped.tensors(basis, None, "cpu")
    assert torch.equal(again, x)  # the part in the middle of a crop is the crop


def test_a_loader_serves_the_states_of_the_data_with_their_conditions(store):
    task = Task(frames=3, condition="hour_of_day")
    basis = CosineBasis((6, 8), (1.0, 1.0))
    memory, stream = (opened(store, task, loader=kind, workers=1) for kind in ("memory", "torch"))
    states, conditions = memory.tensors(basis, None, "cpu")
    assert states.shape == (38, 6, 6, 8)
    loaders = [data.loader(BatchOptions(8, seed=1), "cpu") for data in (memory, stream)]
    for (x, condition), other in islice(zip(*(o.batches() for o in loaders), strict=True), 3):
        torch.testing.assert_close(other, (x, condition))
        distance = (states[:, None] - x).flatten(2).norm(dim=2)
        nearest = distance.argmin(0)
        assert distance.min(0).values.max() < 1e-3
        assert torch.equal(conditions[nearest], condition)
    loaders[1].close()


def test_a_few_samples_are_the_same_ones_at_every_call(store):
    data, basis = opened(store), CosineBasis((6, 8), (1.0, 1.0))
    some, _ = data.tensors(basis, 10, "cpu")
    assert len(some) == 10 and torch.equal(some, data.tensors(basis, 10, "cpu")[0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start": "2030-01-01"}, "no samples to train on: the data run from 2020-01-01T00"),
        ({"validation": ValidationConfig(start="2019-01-01")}, "no samples to train on"),
        ({"crop": (7, 4)}, "does not fit into the grid of 6x8"),
        ({"region": (0, 1, 0, 1)}, "holds no grid"),
    ],
)
def test_data_that_do_not_fit_are_refused(store, options, match):
    with pytest.raises(InputError, match=match):
        opened(store, **options)


@pytest.mark.parametrize(
    ("section", "values", "match"),
    [
        ("data", {"region": [0, 1]}, r"expected \[south, north, west, east\]"),
        ("data", {"crop": [3, "wide"]}, r"expected \[rows, columns\]"),
        ("data", {"end": "soon"}, "data.end=soon is no date"),
        ("data", {"memory": -1}, "data.memory=-1 must be a finite number, at least 0"),
        ("data", {"pace": 3}, "the section data does not fit"),
        ("prior", {"kind": "magic"}, "prior.kind=magic must be one of spectrum, coupled, hybrid"),
        ("prior", {"folds": 1.5}, "prior.folds=1.5 must be a whole number"),
        ("prior", {"folds": 2, "kind": "spectrum"}, "needs operator.regression=false"),
        ("trainer", {"steps": 0}, "trainer.steps=0 must be a whole number, at least 1"),
    ],
)
def test_a_recipe_refuses_values_before_any_data_are_opened(section, values, match):
    config = {
        "domain": "box",
        "condition": "none",
        "data": {"path": "nowhere"},
        "normalization": {},
        "prior": {},
        "operator": {"regression": True},
        "trainer": {"loggers": []},
        "sampling": {},
    }
    Recipe.of(config)
    with pytest.raises(InputError, match=match):
        Recipe.of(config | {section: config[section] | values})
