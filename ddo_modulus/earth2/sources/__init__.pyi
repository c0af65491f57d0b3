# SPDX-License-Identifier: Apache-2.0
from .bufr import BufrSource
from .cds import CdsSource
from .era5 import Era5Source, FieldSource
from .mars import MarsSource
from .nnja import NnjaSource
from .odb import OdbSource

__all__ = [
    "BufrSource",
    "CdsSource",
    "Era5Source",
    "FieldSource",
    "MarsSource",
    "NnjaSource",
    "OdbSource",
]
