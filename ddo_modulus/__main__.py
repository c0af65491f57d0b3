# SPDX-License-Identifier: Apache-2.0
"""``python -m ddo_modulus``: the command ``ddo`` where it is not on the path."""

import sys

from ddo_modulus.cli.main import main

sys.exit(main())
