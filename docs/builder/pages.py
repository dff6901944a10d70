"""What stands in the place of a comment ``<!-- generated: NAME -->`` or ``<!-- messages: PATH ... -->`` of a page."""

from __future__ import annotations

import re
from collections.abc import Iterable

from docs.builder.messages import Message, messages
from docs.builder.tables import GENERATED

_COMMENT = re.compile(r"^<!-- (generated|messages): ([^>]+?) -->$", re.MULTILINE)
_ENTRY = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)

#: Where messages come from that a person can meet.
SOURCES = ("gradprom_ext", "csrc", "models", "train")


def expand(text: str) -> str:
    """A page with everything that is generated in its place.

    :raises KeyError: there is nothing of that name.
    :raises ValueError: messages are asked for of places that have none.
    """
    return _COMMENT.sub(lambda match: GENERATED[match[2]]() if match[1] == "generated" else _listed(match[2]), text)


def _listed(places: str) -> str:
    found = [each for each in messages(*SOURCES) if is_in(each, places)]
    if not found:
        raise ValueError(f"no message comes from {places}")
    lines = "\n".join(f"- `` {each.text} ``" for each in found)
    return f"<details><summary>{len(found)} messages</summary>\n\n{lines}\n\n</details>"


def is_in(message: Message, places: str) -> bool:
    """Whether a message comes from one of some files or folders, which are separated by spaces."""
    return any(message.file == place or message.file.startswith(place.rstrip("/") + "/") for place in places.split())


def without_entry(page: str, found: Iterable[Message]) -> list[Message]:
    """Messages that a page on trouble-shooting has no entry for: neither a row whose first cell is their text, nor a
    list of those from their file.

    >>> page = "| `… is nested` | why |" + chr(10) + "<!-- messages: train/a.py -->"
    >>> found = [Message("b.py", "TypeError", "… is nested"), Message("train/a.py", "RunError", "--x …")]
    >>> without_entry(page, [*found, Message("b.py", "ValueError", "… is new")])
    [Message(file='b.py', kind='ValueError', text='… is new')]
    """
    rows = entries(page)
    lists = [match[2] for match in _COMMENT.finditer(page) if match[1] == "messages"]
    return [
        each
        for each in found
        if not any(is_about(row, each) for row in rows) and not any(is_in(each, places) for places in lists)
    ]


def entries(page: str) -> list[str]:
    """The messages that have a row of their own."""
    return _ENTRY.findall(page)


def is_about(entry: str, message: Message) -> bool:
    """Whether an entry is a message's text, or how that begins; a long text may end with a space and an ellipsis.

    >>> [is_about(entry, Message("", "", "a.b was lost")) for entry in ("a.b was …", "a.b was…", "a.c was …")]
    [True, False, False]
    """
    return entry == message.text or (entry.endswith(" …") and message.text.startswith(entry[:-1]))
