# SPDX-License-Identifier: Apache-2.0
"""Climatology and scale of samples, from the samples or from the statistics of their store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddo_modulus.console import progress_bar
from ddo_modulus.data.normalization import Moments, Normalization
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.statistics import StoredStatistics, moments
from ddo_modulus.training.recipe import NormalizationConfig
from ddo_modulus.training.samples import Samples

log = logging.getLogger(__name__)


def fit_normalization(
    channels: Sequence[str], samples: Samples, options: NormalizationConfig
) -> Normalization:
    """Climatology and scale of samples (:meth:`.Normalization.fit`).

    For samples in a store they come from its statistics, if these are of the same samples;
    otherwise the samples are read once.

    Args:
        channels: Variable ids of the samples.
        samples: What to fit to.
        options: How.

    Raises:
        InputError: If the samples do not determine them, or one cannot be read.
    """
    keywords: dict[str, Any] = {
        "per_hour": options.per_hour,
        "per_point": options.per_point,
        "harmonics": options.harmonics if options.per_hour else None,
    }
    if isinstance(samples.fields, StateReader):
        fitted = Normalization.from_moments(channels, _moments(samples.fields), **keywords)
    else:
        fitted = Normalization.fit(channels, samples.fields, samples.hours, **keywords)
    if options.common_scale:
        scale = fitted.std.square().mean((0, 2, 3), keepdim=True).sqrt()
        fitted = Normalization(fitted.channels, fitted.mean, scale.expand_as(fitted.std).clone())
    return fitted


def _moments(reader: StateReader) -> Moments:
    """Moments of a reader's states, from the statistics of the store if they are of the same."""
    stored = StoredStatistics.of(reader.path)
    if stored is not None and stored.are_of(reader.times):
        log.info("climatology: the statistics of %s", reader.path)
        return stored.moments(reader.channels, *reader.region)
    _log_reading(reader, stored)
    with progress_bar("statistics") as progress:
        return moments(reader, progress)


def _log_reading(reader: StateReader, stored: StoredStatistics | None) -> None:
    """Say why all samples are read."""
    if stored is None:
        log.info("climatology: %s has no statistics; reading %d samples", reader.path, len(reader))
        return
    first, last = (np.datetime_as_string(t, unit="m") for t in reader.times[[0, -1]])
    log.warning(
        "climatology: the statistics of %s are of %d samples from %s to %s, but training takes "
        "%d from %s to %s; computing those by reading them all (or prepare the store with "
        "statistics.start and statistics.end to match)",
        reader.path,
        stored.samples,
        np.datetime_as_string(stored.first, unit="m"),
        np.datetime_as_string(stored.last, unit="m"),
        len(reader),
        first,
        last,
    )
