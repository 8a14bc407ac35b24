"""Unpacking what users upload, reading their lock files, fetching from git: nothing leaves its folder, nothing runs."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from artifacts.memory import MemoryStore
from servicekit.errors import Invalid, TooLarge
from trainer.domain.training import Source
from trainer.ports import Upload
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


async def test_git_sources_are_fetched_at_their_ref(tmp_path: Path) -> None:
    repository = tmp_path / "repository"

    def git(*words: str) -> str:
        config = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(["git", "-C", str(repository), *config, *words], check=True, capture_output=True, text=True).stdout.strip()

    repository.mkdir()
    git("init", "--quiet", "--initial-branch=main")
    (repository / "train.py").write_text("1")
    (repository / "leak").symlink_to("/etc/passwd")
    git("add", "-A")
    git("commit", "--quiet", "-m", "one")
    first = git("rev-parse", "HEAD")
    git("tag", "v1")
    (repository / "train.py").write_text("2")
    git("commit", "--quiet", "-am", "two")
    fetcher = SourceFetcher(MemoryStore(), 1_000_000, protocols=["file"])
    for ref, content in (("v1", "1"), ("main", "2")):
        folder = tmp_path / ref
        folder.mkdir()
        commit = await fetcher.fetch(Source(git_url=f"file://{repository}", git_ref=ref), None, folder)
        assert (commit == first) == (ref == "v1")
        assert (folder / "train.py").read_text() == content
        assert not (folder / ".git").exists()
    (tmp_path / "missing").mkdir()
    with pytest.raises(Invalid, match="git:"):
        await fetcher.fetch(Source(git_url=f"file://{repository}", git_ref="nosuch"), None, tmp_path / "missing")
    (tmp_path / "refused").mkdir()
    plain = SourceFetcher(MemoryStore(), 1_000_000)
    with pytest.raises(Invalid, match="not allowed"):
        await plain.fetch(Source(git_url=f"file://{repository}", git_ref="main"), None, tmp_path / "refused")


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
