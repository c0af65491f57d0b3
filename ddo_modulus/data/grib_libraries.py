# SPDX-License-Identifier: Apache-2.0
"""Imports pygrib, if it is installed, before ecCodes is imported.

The wheels of pygrib, which Earth2Studio imports, and of ecCodes each contain a copy of the same C
library. If ecCodes is loaded first (xarray does so when it guesses the format of a file), the
interpreter crashes on exit with a double free, so that a successful run fails. In the other order
it does not.
"""

import warnings
from contextlib import suppress

with suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # harmless warnings about the size of numpy's arrays
    import pygrib  # noqa: F401
