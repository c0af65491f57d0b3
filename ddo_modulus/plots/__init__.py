# SPDX-License-Identifier: Apache-2.0
"""Figures, films and coastlines."""
