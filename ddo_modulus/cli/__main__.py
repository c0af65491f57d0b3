# SPDX-License-Identifier: Apache-2.0
"""``python -m ddo_modulus.cli``, which existing job scripts call: ``python -m ddo_modulus``."""

import sys

from ddo_modulus.cli.main import main

sys.exit(main())
