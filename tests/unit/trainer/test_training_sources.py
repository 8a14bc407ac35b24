"""Unpacking what users upload, reading their lock files, fetching from git: nothing leaves its folder, nothing runs."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import secrets
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from artifacts.memory import MemoryStore
from servicekit.errors import Invalid, TooLarge
from trainer.domain.training import Source
from trainer.ports import Upload
from trainer.runner.egress import destinations
from trainer.runner.source import SourceFetcher, unpack
from trainer.runner.venv import check_lock, lock_key, packages

Fill = Callable[[tarfile.TarFile], object]
HASH = "--hash=sha256:" + "0" * 64


def archive(path: Path, fill: Fill) -> Path:
    with gzip.open(path, "wb") as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        fill(tar)
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))
    return info


def test_files_and_folders_arrive_with_their_content_and_execute_bit(tmp_path: Path) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        add(tar, "./", type=tarfile.DIRTYPE)
        add(tar, "./train.py", b"print(1)", mode=0o100644)
        add(tar, "sub/deep/run.sh", b"#!/bin/sh", mode=0o4777)
        add(tar, "empty/", type=tarfile.DIRTYPE)

    target = tmp_path / "out"
    target.mkdir()
    unpack(archive(tmp_path / "a.tar.gz", fill), target, 1_000)
    assert (target / "train.py").read_bytes() == b"print(1)"
    assert (target / "train.py").stat().st_mode & 0o7777 == 0o644
    assert (target / "sub/deep/run.sh").stat().st_mode & 0o7777 == 0o755
    assert (target / "empty").is_dir()


@pytest.mark.parametrize(
    "fill",
    [
        lambda tar: add(tar, "/etc/passwd", b"x"),
        lambda tar: add(tar, "../outside", b"x"),
        lambda tar: add(tar, "a/../../outside", b"x"),
        lambda tar: add(tar, "a\\..\\b", b"x"),
        lambda tar: add(tar, "a//b", b"x"),
        lambda tar: add(tar, "link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        lambda tar: add(tar, "link", type=tarfile.LNKTYPE, linkname="train.py"),
        lambda tar: add(tar, "device", type=tarfile.CHRTYPE),
        lambda tar: add(tar, "pipe", type=tarfile.FIFOTYPE),
        lambda tar: (add(tar, "twice", b"1"), add(tar, "twice", b"2")),
        lambda tar: (add(tar, "a", b"1"), add(tar, "a/b", b"2")),
        lambda tar: add(tar, "a" * 300, b"1"),
        lambda tar: add(tar, "d/" * 64 + "file", b"1"),
        lambda tar: add(tar, "d/" * 1_900, type=tarfile.DIRTYPE),
    ],
)
def test_nothing_but_plain_files_below_the_folder(tmp_path: Path, fill: Fill) -> None:
    target = tmp_path / "deep" / "out"
    target.mkdir(parents=True)
    with pytest.raises(Invalid):
        unpack(archive(tmp_path / "a.tar.gz", fill), target, 1_000)
    assert not (tmp_path / "deep" / "outside").exists()
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("data", [b"", b"not an archive", gzip.compress(b"not a tar" * 1_000), gzip.compress(b"x" * 2_000)[:40]])
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar.gz").write_bytes(data)
    with pytest.raises(Invalid, match=r"not a tar\.gz"):
        unpack(tmp_path / "a.tar.gz", tmp_path, 1_000)


def test_a_small_archive_that_unpacks_to_much_is_stopped(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    bomb = archive(tmp_path / "a.tar.gz", lambda tar: [add(tar, f"f{n}", bytes(500_000)) for n in range(10)])
    with pytest.raises(TooLarge, match="unpacked"):
        unpack(bomb, target, 2_000_000)
    assert sum(file.stat().st_size for file in target.iterdir()) <= 2_000_000
    many = archive(tmp_path / "b.tar.gz", lambda tar: [add(tar, f"d{n}", type=tarfile.DIRTYPE) for n in range(11)])
    with pytest.raises(TooLarge, match="files"):
        unpack(many, tmp_path / "other", 2_000_000, max_files=10)


async def test_an_uploaded_source_is_verified_before_it_is_unpacked(tmp_path: Path) -> None:
    store = MemoryStore()
    data = archive(tmp_path / "a.tar.gz", lambda tar: add(tar, "train.py", b"1")).read_bytes()
    await store.put("sources/1", data)
    fetcher = SourceFetcher(store, 10_000)
    good = Upload("1", "ada", "sources/1", len(data), hashlib.sha256(data).hexdigest(), verified=True)
    (tmp_path / "out").mkdir()
    assert await fetcher.fetch(Source(upload_id="1", commit="abc"), good, tmp_path / "out") == "abc"
    assert (tmp_path / "out" / "train.py").read_bytes() == b"1"
    bad = Upload("1", "ada", "sources/1", len(data), "0" * 64, verified=True)
    (tmp_path / "none").mkdir()
    with pytest.raises(Invalid):
        await fetcher.fetch(Source(upload_id="1"), bad, tmp_path / "none")
    assert list((tmp_path / "none").iterdir()) == []


class Repository:
    """A git repository of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"file://{folder}"
        folder.mkdir()
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *words: str) -> str:
        config = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]
        ran = subprocess.run(["git", "-C", str(self.folder), *config, *words], check=True, capture_output=True, text=True)
        return ran.stdout.strip()

    def commit(self, **files: str) -> str:
        for name, content in files.items():
            (self.folder / name).write_text(content)
        self.git("add", "-A")
        self.git("commit", "--quiet", "-m", "more")
        return self.git("rev-parse", "HEAD")


async def test_a_repository_with_too_many_folders_within_one_another_is_refused(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "repository")
    deep = repository.folder / ("d/" * 70)
    deep.mkdir(parents=True)
    (deep / "file").write_text("x")
    repository.commit(**{"train.py": "1"})
    (tmp_path / "out").mkdir()
    with pytest.raises(Invalid, match="64 folders within one another"):
        await SourceFetcher(MemoryStore(), 1_000_000, protocols=["file"]).fetch(
            Source(git_url=repository.url, git_ref="main"), None, tmp_path / "out"
        )


async def test_git_sources_are_fetched_at_their_ref(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "repository")
    (repository.folder / "leak").symlink_to("/etc/passwd")
    first = repository.commit(**{"train.py": "1"})
    repository.git("tag", "v1")
    repository.commit(**{"train.py": "2"})
    fetcher = SourceFetcher(MemoryStore(), 1_000_000, protocols=["file"])
    for ref, content in (("v1", "1"), ("main", "2")):
        folder = tmp_path / ref
        folder.mkdir()
        commit = await fetcher.fetch(Source(git_url=repository.url, git_ref=ref), None, folder)
        assert (commit == first) == (ref == "v1")
        assert (folder / "train.py").read_text() == content
        assert not (folder / ".git").exists()
    (tmp_path / "missing").mkdir()
    with pytest.raises(Invalid, match="git:"):
        await fetcher.fetch(Source(git_url=repository.url, git_ref="nosuch"), None, tmp_path / "missing")
    (tmp_path / "refused").mkdir()
    plain = SourceFetcher(MemoryStore(), 1_000_000)
    with pytest.raises(Invalid, match="not allowed"):
        await plain.fetch(Source(git_url=repository.url, git_ref="main"), None, tmp_path / "refused")


async def test_nothing_of_the_machines_git_is_run_and_no_submodule_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter, a hook or a rewritten address is in many users' configuration, and a repository says which files go through a filter."""
    inner = Repository(tmp_path / "inner")
    inner.commit(secret="s3cr3t")
    repository = Repository(tmp_path / "repository")
    repository.git("submodule", "--quiet", "add", inner.url, "inner")
    repository.commit(**{"train.py": "1", ".gitattributes": "* filter=evil\n"})
    home, ran = tmp_path / "home", tmp_path / "ran"
    (home / "template" / "hooks").mkdir(parents=True)
    hook = home / "template" / "hooks" / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {ran}\n")
    hook.chmod(0o755)
    (home / ".gitconfig").write_text(
        f"""[filter "evil"]\nsmudge = "touch {ran}; cat"\nrequired = true
[init]\ntemplateDir = {home}/template
[core]\nfsmonitor = "touch {ran}"
[submodule]\nrecurse = true
[url "file://{inner.folder}"]\ninsteadOf = {repository.url}
"""
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.hooksPath")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(home / "template" / "hooks"))
    (tmp_path / "out").mkdir()
    await SourceFetcher(MemoryStore(), 1_000_000, protocols=["file"]).fetch(
        Source(git_url=repository.url, git_ref="main"), None, tmp_path / "out"
    )
    assert (tmp_path / "out" / "train.py").read_text() == "1"
    assert list((tmp_path / "out" / "inner").iterdir()) == []
    assert not ran.exists()


class Redirecting(BaseHTTPRequestHandler):
    """Sends whoever asks to another server, and asks who it is when the path says so."""

    to = ""
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        type(self).asked.append(f"{self.server.server_port} {self.path}")  # type: ignore[attr-defined]  # an HTTPServer
        self.send_response(401 if "private" in self.path else 302)
        self.send_header(
            "WWW-Authenticate" if "private" in self.path else "Location", 'Basic realm="x"' if "private" in self.path else self.to
        )
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def git_servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """The ports of two HTTP servers, the first of which redirects to the second."""
    made = [ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) for _ in range(2)]
    monkeypatch.setattr(Redirecting, "to", f"http://127.0.0.1:{made[1].server_port}/stolen")
    monkeypatch.setattr(Redirecting, "asked", [])
    for one in made:
        threading.Thread(target=one.serve_forever, daemon=True).start()
    yield made[0].server_port, made[1].server_port
    for one in made:
        one.shutdown()
        one.server_close()


async def test_only_servers_that_the_operator_names_are_asked_and_none_that_they_name(tmp_path: Path, git_servers: tuple[int, int]) -> None:
    first, second = git_servers
    fetcher = SourceFetcher(MemoryStore(), 1_000_000, destinations(f"127.0.0.1:{first},example.org:443"), protocols=["https", "http"])

    async def refusal(url: str) -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        with pytest.raises(Invalid) as caught:
            await fetcher.fetch(Source(git_url=url, git_ref="main"), None, folder)
        assert [name for name in os.listdir(folder) if name != ".git"] == []
        return str(caught.value)

    for url in (
        f"http://127.0.0.1:{second}/repo",
        f"http://localhost:{first}/repo",
        "https://example.org:8443/repo",
        "https://10.0.0.1/repo",
    ):
        assert "HEADRACE_GIT_HOSTS of the trainer does not name it" in await refusal(url)
    assert Redirecting.asked == []
    assert "git:" in await refusal(f"http://127.0.0.1:{first}/repo")
    assert "git:" in await refusal(f"http://127.0.0.1:{first}/private")  # nobody is asked for a password, which would take for ever
    assert Redirecting.asked
    assert {asked.split()[0] for asked in Redirecting.asked} == {str(first)}
    with pytest.raises(Invalid, match="HEADRACE_GIT_HOSTS"):
        await SourceFetcher(MemoryStore(), 1_000_000).fetch(Source(git_url="https://example.org/repo", git_ref="main"), None, tmp_path)


async def test_a_repository_that_is_too_large_is_not_fetched_to_its_end(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "repository")
    repository.commit(large=secrets.token_hex(500_000))
    (tmp_path / "out").mkdir()
    with pytest.raises(TooLarge, match="10000 bytes"):
        await SourceFetcher(MemoryStore(), 1_000, protocols=["file"]).fetch(
            Source(git_url=repository.url, git_ref="main"), None, tmp_path / "out"
        )
    assert sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file()) < 100_000


def test_a_lock_with_pinned_hashes_is_taken() -> None:
    lock = f"""
# made by a resolver
numpy==2.1.0 ; python_version >= "3.11" \\
    {HASH} \\
    {HASH}
    # via something
torch[extra]==2.13.0+cpu {HASH}
"""
    check_lock(lock.encode())
    assert packages(lock.encode()) == ["numpy==2.1.0", "torch==2.13.0+cpu"]
    check_lock(b"")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("numpy", "pinned"),
        ("numpy>=1", "pinned"),
        ("numpy==1.0", "no hash"),
        ("-r /etc/passwd", "pinned"),
        ("--index-url https://evil.example/simple", "pinned"),
        ("-e .", "pinned"),
        (f"evil @ file:///etc/passwd {HASH}", "pinned"),
        (f"evil @ https://evil.example/x.whl {HASH}", "pinned"),
        (f"numpy==1.0 {HASH} --index-url https://evil.example", "pinned"),
        ("./local.whl", "pinned"),
        (f'numpy==1.0 ; python_version > "3" --index-url=https://evil.example {HASH}', "pinned"),
        (f"numpy==1.0 {HASH[:-1]}", "pinned"),
        ("\xff", "UTF-8"),
    ],
)
def test_a_lock_says_nothing_else(line: str, complaint: str) -> None:
    with pytest.raises(Invalid, match=complaint):
        check_lock(f"ok==1.0 {HASH}\n{line}\n".encode("latin-1"))


def test_another_lock_is_another_environment() -> None:
    assert lock_key(b"a") == lock_key(b"a")
    assert lock_key(b"a") != lock_key(b"b")
