# SPDX-License-Identifier: Apache-2.0
"""The one exception for mistakes in what a user hands in."""


class InputError(ValueError):
    """A mistake in the user's input: says what is wrong, where, and how to mend it."""
