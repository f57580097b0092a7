"""Errors that a user can mend, and how command-line programs report them."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(RuntimeError):
    """A mistake outside the code: a missing file, a wrong config value, an unreadable image.

    The message is for the user: it names the thing at fault and says what to do about it.
    """


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a :class:`UserError` into one line on stderr and exit code 1."""
    try:
        yield
    except UserError as error:
        # A data-loader worker hands its error over with the worker's traceback in front.
        message = str(error).rsplit(f"{UserError.__name__}: ", 1)[-1].strip()
        sys.exit(f"error: {message}")
