"""What layouts of data sets have in common: folders that must be there, and tables whose lines errors can name."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from train.data.base import DataError
from train.errors import reason


def existing_folder(path: Path, *, holds: str) -> Path:
    """
    :param holds: what belongs there, for the message.
    :returns: ``path``.
    :raises DataError: there is no such folder.
    """
    if path.is_dir():
        return path
    archive = path.with_name(f"{path.name}.zip")
    raise DataError(f"the folder {path} is missing; {f'unzip {archive} there' if archive.is_file() else holds}")


def text(path: Path, *, what: str) -> str:
    """The content of a text file in UTF-8, with or without a byte order mark.

    :param what: what the file is, in words, for the message.
    :raises DataError: it is missing, or no such text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{what} {path} is missing; restore it from the data set") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{what} {path} cannot be read: it is not written in UTF-8 ({error.reason})") from error
    except OSError as error:
        raise DataError(f"{what} {path} cannot be read: {reason(error)}") from error


def lines(path: Path, *, what: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, without the blanks around them, each with its number.

    :raises DataError: as for :func:`text`.
    """
    numbered = enumerate(text(path, what=what).splitlines(), 1)
    return [(number, line.strip()) for number, line in numbered if line.strip()]


def table(path: Path, *, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table whose columns are separated by commas. Columns may come in any order; others are ignored.

    :param required: columns that must be there, in small letters.
    :param optional: columns that are read where they are there.
    :returns: for each row that is not empty, the number of its line, and these columns without the blanks around them.
    :raises DataError: it is no such table; the message names the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = [each.strip().lower() for each in next(rows, [])]
            if missing := [column for column in required if column not in header]:
                hint = "; its columns must be separated by commas" if len(header) == 1 and ";" in header[0] else ""
                raise DataError(f"{path} has no column {missing[0]} (only {', '.join(header) or 'nothing'}){hint}")
            wanted = [column for column in (*required, *optional) if column in header]
            if twice := [column for column in wanted if header.count(column) > 1]:
                raise DataError(f"{path} has two columns called {twice[0]}; rename one")
            for values in rows:
                if not any(value.strip() for value in values):
                    continue
                if len(values) != len(header):
                    raise DataError(
                        f"line {rows.line_num} of {path} has {len(values)} fields, the first line {len(header)}; "
                        "quote what holds a comma"
                    )
                fields = dict(zip(header, values, strict=True))
                yield rows.line_num, {column: fields[column].strip() for column in wanted}
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not written in UTF-8 ({error.reason}); save it as 'CSV UTF-8'") from error
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as a table: {error} (line {rows.line_num})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error
