# SPDX-License-Identifier: Apache-2.0
"""Exceptions that the command line reports in one line, each with its own exit status."""


class InputError(ValueError):
    """Invalid input. The message names the input, the problem and the remedy."""


class Stopped(Exception):  # noqa: N818 - not an error: the run can be continued
    """A signal stopped a run early; its state is saved, and the run can be continued."""
