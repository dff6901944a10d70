"""The ground floor: the errors that end a command with one line, and the exit statuses of the commands."""

from __future__ import annotations

USER_ERROR = 2
INTERRUPTED, TERMINATED = 130, 143  # what shells report after Ctrl-C and after SIGTERM: 128 and the signal's number


class RunError(Exception):
    """Something about a run that the user can put right; the message names the culprit and what to do."""


def reason(error: OSError) -> str:
    """The operating system's words for an error, without its number and the file's name.

    >>> reason(FileNotFoundError(2, "No such file or directory", "x"))
    'No such file or directory'
    >>> reason(OSError("telling nothing else"))
    'telling nothing else'
    """
    return error.strerror or str(error) or type(error).__name__
