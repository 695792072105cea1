"""Errors that the user can mend, and what other errors say."""


class UserError(ValueError):
    """A problem with what the user gave: its message is one sentence saying what came, what was wanted, what to do.

    The entry points print the message alone and exit with status 1; everything else is a bug and keeps its traceback.
    """


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
