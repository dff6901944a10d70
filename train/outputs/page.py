"""A report that is one file: what was run, what came out of it, and the images to see it in.

The page needs nothing but itself: images are embedded, and its content security policy forbids every request. It works
from a disk, on paper, on a telephone and in dark rooms. Names are data: the template escapes what it is given.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from train.text import printable

if TYPE_CHECKING:
    from torch import Tensor

_PNG = b"\x89PNG\r\n\x1a\n"
_TEMPLATE, _STYLE, _SCRIPT = "page.html", "page.css", "page.js"  # beside this file


@dataclass(frozen=True)
class Table:
    """Results.

    :param title: above the table.
    :param header: heads the columns; the first one names the rows, and the others are numbers.
    :param rows: as many cells as the header has, as they are to be read.
    :param note: below the table.
    :raises ValueError: a row has more or fewer cells than the header.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"{self.title}: a row of {len(row)} cells below a header of {len(self.header)}: {row}")


@dataclass(frozen=True)
class Figure:
    """A picture.

    :param image: the content of a PNG file.
    :param caption: below it.
    :param description: for those who cannot see it; the caption where it is empty.
    :raises ValueError: the image is no PNG.
    """

    image: bytes
    caption: str
    description: str = ""

    def __post_init__(self) -> None:
        _check(self.image, self.caption)


@dataclass(frozen=True)
class Comparison:
    """A slider between an image and what became of it.

    :param title: above it.
    :param before: the content of a PNG file, to the left of the boundary.
    :param after: to the right of it, by names that the reader chooses from; at least one, of the same size.
    :param before_name: what the image to the left is called.
    :param caption: below it.
    :raises ValueError: an image is no PNG, or there is none to choose.
    """

    title: str
    before: bytes
    after: Mapping[str, bytes]
    before_name: str = "degraded"
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.after:
            raise ValueError(f"{self.title}: there is nothing to compare with")
        for name, image in {self.before_name: self.before, **self.after}.items():
            _check(image, f"{self.title}, {name}")


@dataclass(frozen=True)
class Page:
    """What a report says.

    :param title: its name.
    :param source: where the images come from; the word PHANTOM stands above all else where they are generated.
    :param verdict: what came out, in plain sentences, one to a paragraph.
    :param facts: what was run, by what it is called.
    """

    title: str
    source: Literal["real", "phantom"]
    verdict: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    comparisons: Sequence[Comparison] = ()


def write_page(path: Path, page: Page) -> None:
    """Writes a report as one HTML file, whole or not at all.

    :raises RunError: it cannot be written; the message names it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from train.files import write_file

    folder = Path(__file__).parent
    # The policy names the script by its digest, as the browser sees it: read as text, its lines end in one character.
    style, script = ((folder / name).read_text(encoding="utf-8") for name in (_STYLE, _SCRIPT))
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = lambda image: "data:image/png;base64," + base64.b64encode(image).decode()
    environment.filters["name"] = printable
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template(_TEMPLATE).render(
        page=page, style=Markup(style), script=Markup(script), digest=digest
    )
    write_file(path, text.encode())


def png(image: Tensor) -> bytes:
    """An image as the content of a PNG file of 8 bits.

    :param image: ``float [C, H, W]``, C 1 or 3, clamped to [0, 1] here; NaN is black.
    """
    from PIL import Image

    pixels = (image.detach().cpu().float().nan_to_num(0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(content, format="png")
    return content.getvalue()


def _check(image: bytes, what: str) -> None:
    if not image.startswith(_PNG):
        raise ValueError(f"{what}: this is no PNG image")
