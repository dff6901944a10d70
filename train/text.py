"""Names are data: how a name that a user or a data set chose is shown, and how a shell is given it."""

from __future__ import annotations

import os
import shlex


def printable(text: str) -> str:
    r"""``text`` with everything that a terminal or a figure cannot show as an escape: line breaks, control characters
    and the bytes of file names that are not UTF-8.

    >>> print(printable("exp[lr=1e-3]"), printable("a\nb"), printable("caf\udce9"))
    exp[lr=1e-3] a\nb caf\xe9
    """
    return "".join(each if each.isprintable() else _escape(each) for each in text)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python carries a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def shell_word(name: str | os.PathLike[str]) -> str:
    r"""``name`` as one printable word of a command line, for POSIX shells.

    What is not printable needs the quoting ``$'...'``, which bash, zsh and ksh have.

    >>> print(shell_word("run"), shell_word("x[/b]"), shell_word("it's"), shell_word("a\nb"))
    run 'x[/b]' 'it'"'"'s' $'a\012b'
    """
    text = os.fspath(name)
    if text.isprintable():
        return shlex.quote(text)
    # Octal takes three digits at most, where hexadecimal digits after the escape would be taken for a part of it.
    return "$'" + "".join(_byte(byte) for byte in os.fsencode(text)) + "'"


def _byte(byte: int) -> str:
    character = chr(byte)
    return character if 0x20 <= byte < 0x7F and character not in "'\\" else f"\\{byte:03o}"
