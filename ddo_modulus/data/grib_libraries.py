# SPDX-License-Identifier: Apache-2.0
"""Loads pygrib, if it is there, before ecCodes is.

The wheels of pygrib, which Earth2Studio imports, and of ecCodes each bring a copy of the same C
library. Where ecCodes is loaded first (xarray does it when it looks for the format of a file), the
interpreter crashes at its end with a double free, and a run that went well ends in a failure. In
the other order all is well.
"""

from contextlib import suppress

with suppress(ImportError):
    import pygrib  # noqa: F401
