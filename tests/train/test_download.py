"""Fetching COVID-CT from a web server on this machine: the folder appears whole and verified, or not at all."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import socket
import stat
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from train.data import DataUnavailableError, load
from train.data import download as module
from train.data.sets import covidct

IMAGES = "Images-processed"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files; what is asked for under ``cut/`` breaks off half way."""

    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source: object, outputfile: object) -> None:
        content = source.read()
        outputfile.write(content[: len(content) // 2] if self.server.cut else content)


@pytest.fixture
def server(
    small_covidct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[http.server.ThreadingHTTPServer]:
    """The small data set as its authors publish theirs: list files, and zip files with some rubbish in them."""
    monkeypatch.setenv("no_proxy", "*")
    manifest = tmp_path / "manifest.txt"
    lines = ["# a comment"]
    for file in sorted(path for path in small_covidct.rglob("*") if path.is_file()):
        content = file.read_bytes()
        lines.append(f"{hashlib.sha256(content).hexdigest()} {len(content)} {file.relative_to(small_covidct)}")
    manifest.write_text("\n".join(lines) + "\n")
    for class_name in covidct.CLASS_NAMES:
        folder = small_covidct / covidct.image_folder(class_name)
        with zipfile.ZipFile(folder.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"CT_{class_name}/.DS_Store", b"rubbish")
            for image in sorted(folder.iterdir()):
                archive.write(image, f"CT_{class_name}/{image.name}")
                archive.writestr(f"__MACOSX/CT_{class_name}/{image.name}", b"rubbish")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=small_covidct)) as httpd:
        httpd.cut = False
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(covidct, "BASE_URL", f"http://127.0.0.1:{httpd.server_port}/")
        monkeypatch.setattr(covidct, "MANIFEST", manifest)
        yield httpd
        httpd.shutdown()


def fetch(target: Path) -> None:
    covidct.CovidCT().download(target, progress=False)


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., None]:
    """Fetches, expects an error with the given words, and that no file stays behind."""

    def check(*words: str) -> None:
        target = tmp_path / "target" / "COVID-CT"
        with pytest.raises(DataUnavailableError) as caught:
            fetch(target)
        for word in words:
            assert word in str(caught.value)
        assert list(target.parent.iterdir()) == []

    return check


def zip_file(root: Path) -> Path:
    return root / IMAGES / "CT_COVID.zip"


def add(archive: Path, name: str, content: bytes, mode: int | None = None) -> None:
    member = zipfile.ZipInfo(name)
    if mode is not None:
        member.external_attr = mode << 16
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(member, content)


def test_good(server: object, small_covidct: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "COVID-CT"
    fetch(target)
    fetched = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    original = {str(p.relative_to(small_covidct)): p.read_bytes() for p in small_covidct.rglob("*") if p.is_file()}
    assert fetched == {name: content for name, content in original.items() if not name.endswith(".zip")}
    assert [path.name for path in target.parent.iterdir()] == ["COVID-CT"]


def test_load_fetches_once_into_the_data_root(
    server: object, tmp_path: Path, no_data_at_hand: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    monkeypatch.setenv("GRADPROM_DATA", str(root))
    assert load("covidct", source="auto", size=16).source == "real"
    server.shutdown()
    assert load("covidct", root=root, source="real", size=16).source == "real"
    assert (root / "COVID-CT" / IMAGES).is_dir()


def test_another_process_fetches_it_meanwhile(
    server: object, small_covidct: Path, tmp_path: Path, no_data_at_hand: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that start together must not end up one with real data and the other with phantoms."""
    monkeypatch.setenv("GRADPROM_DATA", str(tmp_path / "root"))
    verify = module.verify

    def verify_slowly(folder: Path, manifest: object) -> None:
        verify(folder, manifest)
        fetched = tmp_path / "root" / "COVID-CT"
        if not fetched.exists():
            shutil.copytree(folder, fetched)

    monkeypatch.setattr(module, "verify", verify_slowly)
    data = load("covidct", source="auto", size=16)
    assert (data.source, data.folder) == ("real", tmp_path / "root" / "COVID-CT")
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["COVID-CT"]


def test_line_ends_of_the_lists_do_not_matter(server: object, small_covidct: Path, tmp_path: Path) -> None:
    for path in small_covidct.rglob("*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    fetch(tmp_path / "target" / "COVID-CT")


def test_another_name_in_a_list(server: object, small_covidct: Path, refused: Callable[..., None]) -> None:
    path = small_covidct / covidct.list_file("val", "COVID")
    path.write_bytes(path.read_bytes().replace(b"%1", b"%2"))
    refused(covidct.list_file("val", "COVID"), "checksum")


def test_archives_without_an_inner_folder(server: object, small_covidct: Path, tmp_path: Path) -> None:
    folder = small_covidct / IMAGES / "CT_COVID"
    with zipfile.ZipFile(zip_file(small_covidct), "w") as archive:
        for image in folder.iterdir():
            archive.write(image, image.name)
    fetch(tmp_path / "new" / "COVID-CT")


def test_cut_off_transfer(server: object, refused: Callable[..., None]) -> None:
    server.cut = True
    refused("broke off")


def test_truncated_archive(server: object, small_covidct: Path, refused: Callable[..., None]) -> None:
    archive = zip_file(small_covidct)
    archive.write_bytes(archive.read_bytes()[:-100])
    refused("CT_COVID.zip is not an intact zip archive")


def test_damaged_archive(server: object, small_covidct: Path, refused: Callable[..., None]) -> None:
    archive = zip_file(small_covidct)
    content = bytearray(archive.read_bytes())
    content[200:260] = bytes(60)
    archive.write_bytes(content)
    refused("CT_COVID.zip is not an intact zip archive")


def test_wrong_checksum(server: object, small_covidct: Path, refused: Callable[..., None]) -> None:
    file = small_covidct / covidct.list_file("val", "COVID")
    file.write_bytes(file.read_bytes().swapcase())
    refused("valCT_COVID.txt", "checksum")


def test_wrong_length(server: object, small_covidct: Path, refused: Callable[..., None]) -> None:
    archive = zip_file(small_covidct)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("CT_COVID/val COVID%1.png", b"0" * 5000)
    refused("val COVID%1.png has 5000 bytes instead of")


def test_file_missing_from_the_archive(server: object, small_covidct: Path, refused: Callable[..., None]) -> None:
    with zipfile.ZipFile(zip_file(small_covidct), "w"):
        pass
    refused("lacks Images-processed/CT_COVID/")


@pytest.mark.parametrize("name", ["../escaped", "CT_COVID/../../escaped", "/escaped", "..\\escaped", "C:\\escaped"])
def test_zip_slip(server: object, small_covidct: Path, tmp_path: Path, refused: Callable, name: str) -> None:
    add(zip_file(small_covidct), name, b"evil")
    refused("escapes the folder", "CT_COVID.zip")
    assert not list(tmp_path.rglob("*escaped*"))
    assert not Path("/escaped").exists()


def test_a_member_that_is_longer_than_it_says(
    server: object, small_covidct: Path, refused: Callable[..., None]
) -> None:
    """A bomb whose directory lies: what is unpacked is no longer than what was announced."""
    archive = zip_file(small_covidct)
    with zipfile.ZipFile(archive) as bundle:
        told = bundle.getinfo("CT_COVID/val COVID%1.png").file_size
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("CT_COVID/val COVID%1.png", bytes(10_000_000))
    content = archive.read_bytes()
    assert content.count(struct.pack("<I", 10_000_000)) == 2
    archive.write_bytes(content.replace(struct.pack("<I", 10_000_000), struct.pack("<I", told)))
    refused("CT_COVID.zip is not an intact zip archive")


def test_a_download_that_does_not_end(
    server: object, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLACK", -10_000)
    refused("is refused: it is longer than")


def test_links_are_refused(server: object, small_covidct: Path, refused: Callable[..., None]) -> None:
    add(zip_file(small_covidct), "CT_COVID/link.png", b"/etc/passwd", stat.S_IFLNK | 0o777)
    refused("is a link")


def test_not_there(server: object, small_covidct: Path, refused: Callable[..., None]) -> None:
    zip_file(small_covidct).unlink()
    refused("CT_COVID.zip answers 404")


def test_server_that_refuses_the_connection(
    tmp_path: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(covidct, "BASE_URL", f"http://127.0.0.1:{port}/")
    refused("cannot be reached")


def test_network_that_swallows_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that never answers is not covered by the socket's time-out, but by ours."""
    release = threading.Event()
    monkeypatch.setattr(module.urllib.request, "urlopen", lambda *_, **__: release.wait(5))
    remote = module.Remote(base_url="http://nowhere.invalid/", files=["a"], manifest={})
    with pytest.raises(DataUnavailableError, match=r"does not answer within 0\.1 s"):
        module.download(remote, tmp_path / "target", progress=False, timeout=0.1)
    release.set()


def test_nothing_is_fetched_over_a_folder_with_other_things(server: object, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "diary.txt").write_text("mine")
    with pytest.raises(DataUnavailableError, match="in the way"):
        fetch(target)
    assert (target / "diary.txt").read_text() == "mine"


def test_unwritable_target(server: object, tmp_path: Path) -> None:
    obstacle = tmp_path / "file"
    obstacle.touch()
    with pytest.raises(DataUnavailableError, match="cannot put the data set into"):
        fetch(obstacle / "COVID-CT")
