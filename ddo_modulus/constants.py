# SPDX-License-Identifier: Apache-2.0
"""Physical constants, in SI units unless the name says otherwise."""

#: Mean radius of the Earth (IUGG), km.
EARTH_RADIUS_KM = 6371.0
#: Standard acceleration of gravity, m/s2.
GRAVITY = 9.80665
