# SPDX-License-Identifier: Apache-2.0
"""Neural operators made of matrix products, pointwise functions and normalisation."""
