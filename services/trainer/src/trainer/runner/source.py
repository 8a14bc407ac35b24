"""Fetches the code of a training: unpacks an uploaded folder, or takes one commit from a git server. Neither is trusted."""

from __future__ import annotations

import asyncio
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from artifacts import ArtifactStore
from servicekit.errors import Invalid, TooLarge, Unavailable

from trainer.domain.training import Source
from trainer.ports import Upload
from trainer.runner.child import output_of

MAX_FILES = 50_000
_GIT_S = 600.0
_CHUNK = 1 << 20

# What git says when the server, not the request, is at fault.
_PASSING = ("Could not resolve host", "Connection", "timed out", "Operation too slow", "early EOF", "error: 5", "unable to access")
_LASTING = ("Authentication failed", "not found", "403", "404", "could not read Username", "Permission denied")


class SourceFetcher:
    """Implements `ports.Sources`."""

    def __init__(self, objects: ArtifactStore, max_bytes: int, protocols: Sequence[str] = ("https", "ssh")) -> None:
        """`max_bytes` is what a source may have, packed as well as unpacked ten times as much. `protocols` are those of git."""
        self._objects = objects
        self._max_bytes = max_bytes
        self._protocols = tuple(protocols)

    async def fetch(self, source: Source, upload: Upload | None, folder: Path) -> str:
        if source.git_url:
            return await self._clone(source.git_url, source.git_ref, folder)
        if upload is None:
            raise Invalid(f"there is no upload {source.upload_id}")
        archive = folder.with_name(f"{folder.name}.tar.gz")
        try:
            await self._objects.download(upload.key, archive, sha256=upload.sha256)
            await asyncio.to_thread(unpack, archive, folder, self._max_bytes * 10)
        finally:
            archive.unlink(missing_ok=True)
        return source.commit

    async def _clone(self, url: str, ref: str, folder: Path) -> str:
        await self._git(folder, "init", "--quiet")
        # A server may offer anything: no hook, no submodule, no other protocol, nothing asked of a user.
        await self._git(folder, "fetch", "--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules", "--", url, ref)
        await self._git(folder, "-c", "advice.detachedHead=false", "checkout", "--quiet", "--no-recurse-submodules", "FETCH_HEAD")
        commit = await self._git(folder, "rev-parse", "HEAD")
        await asyncio.to_thread(shutil.rmtree, folder / ".git")
        await asyncio.to_thread(_check_size, folder, self._max_bytes * 10)
        return commit

    async def _git(self, folder: Path, *words: str) -> str:
        options = ["protocol.allow=never", "core.hooksPath=/dev/null", "core.symlinks=true", "core.fsmonitor=false", "gc.auto=0"]
        options += [f"protocol.{name}.allow=always" for name in self._protocols]
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "SSH_AUTH_SOCK", "https_proxy", "HTTPS_PROXY") if name in os.environ},
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "/bin/true",
            "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oStrictHostKeyChecking=accept-new",
            "GIT_ALLOW_PROTOCOL": ":".join(self._protocols),
            "GIT_LFS_SKIP_SMUDGE": "1",
        }
        configured = [word for option in options for word in ("-c", option)]
        try:
            code, said = await output_of(["git", *configured, *words], environment, _GIT_S, folder)
        except TimeoutError:
            raise Unavailable(f"git did not end within {_GIT_S:g} s") from None
        if code != 0:
            text = said.strip()[-500:]
            if any(sign in text for sign in _PASSING) and not any(sign in text for sign in _LASTING):
                raise Unavailable(f"git: {text}")
            raise Invalid(f"git: {text}")
        return said.strip()


def unpack(archive: Path, folder: Path, max_bytes: int, max_files: int = MAX_FILES) -> None:
    """Unpacks a tar.gz into an existing folder. Blocks.

    Only plain files and folders below it are accepted: no absolute path, no `..`, no link, no device; raises Invalid otherwise,
    and TooLarge beyond `max_bytes` unpacked or `max_files` files and folders.
    """
    left = max_bytes
    count = 0
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                count += 1
                if count > max_files:
                    raise TooLarge(f"the source has more than {max_files} files")
                target = folder / _safe(member)
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                left -= member.size
                if left < 0:
                    raise TooLarge(f"the source has more than {max_bytes} bytes unpacked")
                content = tar.extractfile(member)
                if content is not None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _write(content, target, 0o755 if member.mode & 0o100 else 0o644)
    except (tarfile.TarError, EOFError, OSError) as exc:
        # An error of the machine, but for names that contradict each other (a file where a folder is needed, a name given twice).
        contradiction = isinstance(exc, FileExistsError | NotADirectoryError | IsADirectoryError)
        if isinstance(exc, OSError) and exc.errno is not None and not contradiction:
            raise
        raise Invalid(f"the source is not a tar.gz that can be unpacked: {exc}") from exc


def _safe(member: tarfile.TarInfo) -> str:
    name = member.name.removeprefix("./").rstrip("/") or "."
    plain = name == "." or not any(part in ("", ".", "..") for part in name.split("/"))
    if not plain or "\\" in name or "\x00" in name:
        raise Invalid(f"the source holds {member.name!r}, which is not a path below its folder")
    if not member.isfile() and not member.isdir():
        raise Invalid(f"the source holds {member.name!r}, which is neither a file nor a folder")
    return name


def _write(content: IO[bytes], target: Path, mode: int) -> None:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with open(descriptor, "wb") as file:
        while chunk := content.read(_CHUNK):
            file.write(chunk)


def _check_size(folder: Path, max_bytes: int) -> None:
    size = count = 0
    for parent, folders, files in os.walk(folder):
        count += len(files) + len(folders)
        size += sum(os.lstat(os.path.join(parent, name)).st_size for name in files)
    if count > MAX_FILES or size > max_bytes:
        raise TooLarge(f"the source has {count} files of {size} bytes; at most {MAX_FILES} files and {max_bytes} bytes")
