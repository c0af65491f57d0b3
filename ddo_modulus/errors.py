# SPDX-License-Identifier: Apache-2.0
"""The exceptions that the command line answers with one line and a status of their own."""


class InputError(ValueError):
    """A mistake in the user's input: says what is wrong, where, and how to mend it."""


class Stopped(Exception):  # noqa: N818 - no error: the run is to be continued
    """A signal ended a run before its time; its state is saved and it can be continued."""
