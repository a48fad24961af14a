"""The one error that is the user's to mend."""


class UserError(ValueError):
    """A mistake in a command, a configuration or a data file: shown as one line, without a traceback, exit code 2.

    The message names the key, the value that came, what is allowed and the mend. A mistake of the program itself is an
    `assert` instead and keeps its traceback.
    """


class StoreError(Exception):
    """The feedback store cannot take or give anything now (locked, full, gone); nothing was changed."""
