# SPDX-License-Identifier: Apache-2.0
"""Commands of ``ddo``: a module each, with one function ``run(config)``."""
