# SPDX-License-Identifier: Apache-2.0
"""From a package to results: assimilation, generation and super-resolution."""
