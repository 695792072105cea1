"""Errors that the user can mend."""


class UserError(ValueError):
    """A problem with what the user gave: its message is one sentence saying what came, what was wanted, what to do.

    The entry points print the message alone and exit with status 1; everything else is a bug and keeps its traceback.
    """
