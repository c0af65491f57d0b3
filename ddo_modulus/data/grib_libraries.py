# SPDX-License-Identifier: Apache-2.0
"""Loads pygrib, if it is there, before ecCodes is.

The wheels of pygrib, which Earth2Studio imports, and of ecCodes each bring a copy of the same C
library. Where ecCodes is loaded first (xarray does it when it looks for the format of a file), the
interpreter crashes at its end with a double free, and a run that went well ends in a failure. In
the other order all is well.
"""

import warnings
from contextlib import suppress

with suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the size of numpy's arrays, which is no harm
    import pygrib  # noqa: F401
