# SPDX-License-Identifier: Apache-2.0
"""Data: sources of fields and observations, simulators, and stores."""
