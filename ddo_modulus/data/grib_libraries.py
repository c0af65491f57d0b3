# SPDX-License-Identifier: Apache-2.0
"""Imports pygrib, if it is installed, so that it and ecCodes can share a process.

The wheels of pygrib, which Earth2Studio imports, and of ecCodes each contain a copy of the same C
library. ecCodes loads its copy for the whole process (``RTLD_GLOBAL``), so that a copy loaded later
would use the first one's variables: both would free them, and the interpreter crashes on exit after
a successful run. With ``RTLD_DEEPBIND`` pygrib's copy uses its own, in either order of import.
"""

import os
import sys
import warnings
from contextlib import suppress

_flags = sys.getdlopenflags()
with suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # harmless warnings about the size of numpy's arrays
    sys.setdlopenflags(_flags | getattr(os, "RTLD_DEEPBIND", 0))
    try:
        import pygrib  # noqa: F401
    finally:
        sys.setdlopenflags(_flags)
