# SPDX-License-Identifier: Apache-2.0
"""Earth2Studio components; they need `pip install ddo-modulus[earth2]`."""
