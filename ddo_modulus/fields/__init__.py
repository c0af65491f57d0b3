# SPDX-License-Identifier: Apache-2.0
"""Fields on planes and spheres: grids, bases, Gaussian fields and their exact denoiser."""
