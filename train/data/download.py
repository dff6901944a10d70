"""Fetching a data set: it appears in its folder complete and verified, or not at all."""

from __future__ import annotations

import hashlib
import io
import shutil
import stat
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from train.data.base import DataUnavailableError

if TYPE_CHECKING:
    from rich.progress import Progress

_BLOCK = 1 << 18
_SLACK = 1 << 26  # bytes by which a download may be longer than twice what is wanted of it


@dataclass(frozen=True)
class FileFacts:
    """What is known of one file: its length in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Remote:
    """Where a data set lies on the web, and what it must consist of once it is here.

    :param base_url: every other address is relative to this one; ends in ``/``.
    :param files: fetched as they are.
    :param archives: zip file -> the folder that its images go into.
    :param manifest: the data set, file by file (relative path -> facts); nothing else is ever written.
    """

    base_url: str
    files: Sequence[str]
    manifest: Mapping[str, FileFacts]
    archives: Mapping[str, str] = field(default_factory=dict)


def read_manifest(path: Path) -> dict[str, FileFacts]:
    """Reads a manifest: one line ``<sha256> <size> <path relative to the data set's folder>`` per file."""
    manifest = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            sha256, size, name = line.split(" ", 2)
            manifest[name] = FileFacts(int(size), sha256)
    return manifest


def download(remote: Remote, target: Path, *, progress: bool, timeout: float = 8.0) -> None:
    """Fetches, unpacks and verifies a data set in a temporary folder beside ``target``, then renames that folder.

    :param target: the data set's folder; must not exist, or be empty.
    :param progress: show a progress bar on stderr.
    :param timeout: seconds without an answer after which the network counts as absent.
    :raises DataUnavailableError: anything went wrong; ``target`` is as it was before.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise DataUnavailableError(f"{target} is in the way: it is there, but it is not the data set")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-partial-") as scratch, bar:
            folder = Path(scratch) / target.name
            folder.mkdir()
            for name in remote.files:
                wanted = remote.manifest[name].size if name in remote.manifest else 0
                _fetch(_url(remote, name), _inside(folder, name), bar, timeout, most=2 * wanted + _SLACK)
            for name, destination in remote.archives.items():
                archive = Path(scratch) / PurePosixPath(name).name
                wanted = sum(facts.size for path, facts in remote.manifest.items() if path.startswith(destination))
                _fetch(_url(remote, name), archive, bar, timeout, most=2 * wanted + _SLACK)
                unpack(archive, folder, destination, remote.manifest)
                archive.unlink()
            verify(folder, remote.manifest)
            folder.replace(target)
    except OSError as error:
        raise DataUnavailableError(f"cannot put the data set into {target}: {error}") from error


def verify(folder: Path, manifest: Mapping[str, FileFacts]) -> None:
    """Compares every file of the manifest with what lies in ``folder``, by length and SHA-256.

    Text files are compared line by line: whether their lines end in LF or CRLF depends on who packed them.

    :raises DataUnavailableError: a file is missing or differs.
    """
    for name, facts in manifest.items():
        path = folder / name
        if not path.is_file():
            raise DataUnavailableError(f"the download lacks {name}")
        with path.open("rb") as file:
            text = b"".join(line.rstrip() + b"\n" for line in file) if path.suffix == ".txt" else None
            _check(name, _facts(file if text is None else io.BytesIO(text)), facts)


def unpack(archive: Path, folder: Path, destination: str, manifest: Mapping[str, FileFacts]) -> None:
    """Unpacks those files of a zip archive that the manifest has under ``destination``, matched by file name.

    Only names from the manifest are ever written, so a hostile archive could not reach another place anyway; one that
    tries (absolute paths, ``..``, links) is refused as a whole all the same, since nothing in it can be trusted.

    :param archive: the zip file.
    :param folder: the data set's folder.
    :param destination: folder inside it, as the manifest spells it.
    :raises DataUnavailableError: the archive is damaged or hostile, or a file in it is not that of the manifest.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = bundle.infolist()
            for member in members:
                _refuse_hostile(archive, member)
            for member in members:
                name = f"{destination}/{PurePosixPath(member.filename).name}"
                if member.is_dir() or name not in manifest or "__MACOSX" in PurePosixPath(member.filename).parts:
                    continue
                if member.file_size != manifest[name].size:  # before unpacking: also stops a decompression bomb
                    _check(name, FileFacts(member.file_size, manifest[name].sha256), manifest[name])
                path = _inside(folder, name)
                with bundle.open(member) as source, path.open("wb") as out:
                    shutil.copyfileobj(source, out, _BLOCK)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataUnavailableError(f"{archive.name} is not an intact zip archive ({error})") from error


def _refuse_hostile(archive: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename.replace("\\", "/")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or ":" in name:
        raise DataUnavailableError(f"{archive.name} is refused: its member {member.filename!r} escapes the folder")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise DataUnavailableError(f"{archive.name} is refused: its member {member.filename!r} is a link")


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _url(remote: Remote, name: str) -> str:
    return remote.base_url + urllib.parse.quote(name)


def _facts(file: IO[bytes]) -> FileFacts:
    digest, size = hashlib.sha256(), 0
    while block := file.read(_BLOCK):
        digest.update(block)
        size += len(block)
    return FileFacts(size, digest.hexdigest())


def _check(name: str, found: FileFacts, wanted: FileFacts) -> None:
    if found.size != wanted.size:
        raise DataUnavailableError(f"the downloaded {name} has {found.size} bytes instead of {wanted.size}")
    if found.sha256 != wanted.sha256:
        raise DataUnavailableError(f"the downloaded {name} has another checksum (SHA-256) than the published file")


def _fetch(url: str, path: Path, bar: Progress, timeout: float, *, most: int) -> None:
    """Streams ``url`` into ``path``; a connection that ends early is an error, and so is one that does not end.

    :param most: bytes, beyond which it cannot be what is wanted.
    """
    task = bar.add_task(PurePosixPath(urllib.parse.urlsplit(url).path).name, total=None)
    try:
        with _open(url, timeout) as response, path.open("wb") as out:
            announced = response.headers.get("Content-Length")
            total = int(announced) if announced and announced.isdigit() else None
            bar.update(task, total=total)
            received = 0
            while block := response.read(_BLOCK):
                out.write(block)
                received += len(block)
                if received > most:
                    raise DataUnavailableError(f"{url} is refused: it is longer than {most:,} bytes")
                bar.update(task, completed=received)
    except urllib.error.HTTPError as error:
        raise DataUnavailableError(f"{url} answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise DataUnavailableError(f"{url} cannot be reached ({error.reason})") from error
    except (HTTPException, TimeoutError, ConnectionError) as error:
        raise DataUnavailableError(f"the download of {url} broke off ({error})") from error
    if total is not None and received != total:
        raise DataUnavailableError(f"the download of {url} broke off after {received} of {total} bytes")


def _open(url: str, timeout: float) -> HTTPResponse:
    """Opens ``url``, or gives up after ``timeout`` seconds *in all*.

    A socket's own time-out does not cover the name server, and counts anew for each of a host's addresses; without a
    network that adds up to minutes. Hence the thread, which is not waited for.
    """
    outcome: list[HTTPResponse | Exception] = []

    def attempt() -> None:
        try:
            outcome.append(urllib.request.urlopen(url, timeout=timeout))
        except Exception as error:  # handed to the caller below
            outcome.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise DataUnavailableError(f"{url} does not answer within {timeout:g} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
