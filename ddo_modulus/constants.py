# SPDX-License-Identifier: Apache-2.0
"""Physical constants, in SI units unless the name says otherwise."""

#: Mean radius of the Earth (IUGG), km.
EARTH_RADIUS_KM = 6371.0
#: Standard acceleration of gravity, m/s2.
GRAVITY = 9.80665

# ---- the standard atmosphere of ICAO (Doc 7488/3, 1993) -----------------------------------------

#: Gas constant of dry air, J/(kg K).
GAS_CONSTANT = 287.05287
#: Lapse rate of the troposphere, K/m.
LAPSE_RATE = 0.0065
#: Temperature at mean sea level, K.
STANDARD_TEMPERATURE = 288.15
#: Pressure at mean sea level, Pa.
STANDARD_PRESSURE = 101325.0

# ---- water vapour, as in ECMWF's IFS (Documentation, Part IV) -----------------------------------

#: Gas constant of dry air over that of water vapour.
EPSILON = 287.0597 / 461.5250
#: Saturation pressure over water is ``e0 * exp(a * (T - t0) / (T - t1))``, in Pa at ``T`` in K
#: (Buck 1981): ``(e0, a, t0, t1)``.
SATURATION = (611.21, 17.502, 273.16, 32.19)
