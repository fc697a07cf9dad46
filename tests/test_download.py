"""Tests of scripts/download_uniref50.sh with a local server that interrupts downloads."""

import contextlib
import gzip
import hashlib
import http.server
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ROOT, require_program

NAME = "uniref50.fasta.gz"
METALINK = """<?xml version="1.0" encoding="UTF-8"?>
<metalink version="3.0" xmlns="http://www.metalinker.org/" type="static">
 <version>{release}</version>
 <files>
  <file name="uniref50.xml.gz"><size>7</size><verification><hash type="md5">0</hash></verification></file>
  <file name="{name}">
   <size>{size}</size>
   <verification><hash type="sha1">0</hash><hash type="md5">{md5}</hash></verification>
   <resources><url location="ie" type="ftp" preference="60">ftp://elsewhere/{name}</url></resources>
  </file>
 </files>
</metalink>
"""


class Server(http.server.ThreadingHTTPServer):
    """Serve one release. Each response ends after at most `at_most` bytes of the file."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.release, self.md5 = content, "2026_04", hashlib.md5(content).hexdigest()
        self.size, self.at_most, self.ranges, self.pause = len(content), len(content), True, 0.0
        self.requested_ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/uniref50"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path.endswith("/RELEASE.metalink"):
            text = METALINK.format(release=self.server.release, name=NAME, size=self.server.size, md5=self.server.md5)
            self.answer(200, text.encode(), len(text))
        elif self.path.endswith(f"/{NAME}"):
            wanted = self.headers.get("Range")
            self.server.requested_ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted and self.server.ranges else 0
            self.answer(206 if start else 200, self.server.content[start:], self.server.at_most, start)
        else:
            self.send_error(404)

    def answer(self, code: int, body: bytes, at_most: int, start: int = 0) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        if code == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{start + len(body)}")
        self.end_headers()
        for first in range(0, min(len(body), at_most), 5000):
            self.wfile.write(body[first : min(first + 5000, at_most)])
            self.wfile.flush()
            time.sleep(self.server.pause if self.path.endswith(NAME) else 0)
        self.close_connection = True  # the client sees a broken connection if bytes are missing

    def log_message(self, format: str, *args: object) -> None: ...


@contextlib.contextmanager
def serving(content: bytes) -> Iterator[Server]:
    server = Server(content)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    require_program("curl")
    with serving(gzip.compress(b">UniRef50_A\nMKV\n" + os.urandom(200_000).hex().encode())) as server:
        yield server


def start(server: Server, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [ROOT / "scripts/download_uniref50.sh", *(arguments or (str(folder / "d"),))],
        env=os.environ | {"UNIREF_URL": server.url, "UNIREF_WAIT": "0"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def download(server: Server, folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(server, folder, *arguments)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_interrupted_download_is_resumed_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.at_most = len(server.content) // 3
    code, output, errors = download(server, tmp_path)
    assert code == 0, errors
    assert (tmp_path / "d" / NAME).read_bytes() == server.content
    assert names(tmp_path / "d") == [NAME, f"{NAME}.release"]
    third = server.at_most
    assert server.requested_ranges == [None, f"bytes={third}-", f"bytes={2 * third}-"] + [f"bytes={3 * third}-"] * (
        len(server.content) > 3 * third
    )
    record = (tmp_path / "d" / f"{NAME}.release").read_text()
    expected = f"release=2026_04\nsize={server.size}\nmd5={server.md5}\nurl={server.url}/{NAME}\n"
    assert record == expected
    assert f"{NAME}: release 2026_04" in output
    code, output, _ = download(server, tmp_path)
    # no new request, because the file exists
    assert (code, len(server.requested_ranges)) == (0, 3 + (len(server.content) > 3 * third))
    assert "exists already: release 2026_04" in output


def test_a_killed_download_is_resumed(server: Server, tmp_path: Path) -> None:
    server.pause = 0.02
    process = start(server, tmp_path)
    part = tmp_path / "d" / f"{NAME}.part"
    deadline = time.time() + 30
    while not part.exists() or part.stat().st_size < 20_000:
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    had = part.stat().st_size
    server.pause = 0
    code, output, errors = download(server, tmp_path)
    assert code == 0, errors
    assert f"{had} of them downloaded already" in output
    assert server.requested_ranges == [None, f"bytes={had}-"]
    assert (tmp_path / "d" / NAME).read_bytes() == server.content


def test_a_download_killed_while_it_renames_its_files_is_completed(server: Server, tmp_path: Path) -> None:
    assert download(server, tmp_path)[0] == 0
    folder = tmp_path / "d"
    record = (folder / f"{NAME}.release").read_text()
    # as if the download was killed after it copied the .release file, and before it renamed the downloaded file
    (folder / NAME).rename(folder / f"{NAME}.part")
    (folder / f"{NAME}.part.release").write_text(record)
    assert download(server, tmp_path)[0] == 0
    assert names(folder) == [NAME, f"{NAME}.release"]
    # as if the download was killed just before it deleted the .part.release file
    (folder / f"{NAME}.part.release").write_text(record)
    assert download(server, tmp_path)[0] == 0
    assert len(server.requested_ranges) == 1


def test_a_second_download_into_the_same_folder_is_rejected(server: Server, tmp_path: Path) -> None:
    server.pause = 0.05
    process = start(server, tmp_path)
    while not (tmp_path / "d" / f"{NAME}.part").exists():
        assert process.poll() is None
        time.sleep(0.01)
    code, _, errors = download(server, tmp_path)
    assert code == 1
    assert "another download into" in errors
    server.pause = 0
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_a_partial_file_of_another_release_is_not_continued(server: Server, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / f"{NAME}.part").write_bytes(server.content[:100])
    (tmp_path / "d" / f"{NAME}.part.release").write_text("release=2026_03\nsize=5\nmd5=0\nurl=x\n")
    code, _, errors = download(server, tmp_path)
    assert code == 1
    assert (
        f"{NAME}.part is of release 2026_03, the server has release 2026_04; move it aside to download release 2026_04"
        in errors
    )
    assert (tmp_path / "d" / f"{NAME}.part").read_bytes() == server.content[:100]
    (tmp_path / "d" / f"{NAME}.part.release").unlink()
    assert f"{NAME}.part.release does not; move" in download(server, tmp_path)[2]
    assert server.requested_ranges == []


def test_a_finished_file_of_another_release_is_kept(server: Server, tmp_path: Path) -> None:
    assert download(server, tmp_path)[0] == 0
    server.release = "2026_05"
    code, _, errors = download(server, tmp_path)
    assert code == 1
    assert "is of release 2026_04, the server has release 2026_05" in errors
    assert (tmp_path / "d" / NAME).read_bytes() == server.content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"md5": "f" * 32}, "has MD5 [0-9a-f]{32}, release 2026_04 has f{32}; move it aside and start again"),
        ({"size": 1000}, "has [0-9]+ bytes, release 2026_04 has 1000; move it aside and start again"),
        ({"size": 10**9}, "sends no data after byte [0-9]+"),
        ({"at_most": 0}, "sends no data after byte 0"),
        ({"ranges": False, "at_most": 90_000}, "cannot be resumed at byte 90000: the server does not support ranges"),
    ],
)
def test_a_download_that_differs_from_the_release_is_an_error(
    server: Server, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    vars(server).update(change)
    code, _, errors = download(server, tmp_path)
    assert code == 1
    assert not (tmp_path / "d" / NAME).exists()
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last), last


def test_nothing_is_downloaded_if_the_release_cannot_be_read(server: Server, tmp_path: Path) -> None:
    server.size = "</size>"  # makes the metalink invalid XML
    assert "gives no version, size and MD5 of uniref50.fasta.gz" in download(server, tmp_path)[2]
    assert "expected at most one folder, got 2" in download(server, tmp_path, "a", "b")[2]
    code, output, _ = download(server, tmp_path, "--help")
    assert code == 0
    assert "scripts/download_uniref50.sh [FOLDER]" in output
    assert "UNIREF_WAIT" in output
    assert server.requested_ranges == []
