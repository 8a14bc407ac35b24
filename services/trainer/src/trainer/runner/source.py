"""Fetches the code of a training: unpacks an uploaded folder, or takes one commit from a git server. Neither is trusted."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import tarfile
from collections.abc import Container, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from artifacts import ArtifactStore
from servicekit import trees
from servicekit.errors import Invalid, TooLarge, Unavailable

from trainer.domain.training import Source
from trainer.ports import Upload
from trainer.runner.child import output_of
from trainer.runner.egress import HTTP, HTTPS, Destination, destination

SETTING = "HEADRACE_GIT_HOSTS"
MAX_FILES = 50_000
MAX_DEPTH = 64
"""Folders within one another. Who walks the source may recurse."""

_GIT_S = 600.0
_CHUNK = 1 << 20
_INHERITED = ("PATH", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "GIT_SSL_CAINFO", "GIT_SSL_CAPATH", "SSL_CERT_FILE")

# What git says when the server, not the request, is at fault.
_PASSING = ("Could not resolve host", "Connection", "timed out", "Operation too slow", "early EOF", "error: 5", "unable to access")
_TOO_LARGE = (f"died of signal {signal.SIGXFSZ}", "File too large")
_LASTING = ("error: 30", "Authentication failed", "not found", "403", "404", "could not read Username", "Permission denied")


class SourceFetcher:
    """Implements `ports.Sources`."""

    def __init__(
        self, objects: ArtifactStore, max_bytes: int, git_hosts: Container[Destination] = (), protocols: Sequence[str] = ("https",)
    ) -> None:
        """`max_bytes` is what a source may have, packed as well as unpacked ten times as much. `git_hosts` are the servers that git may
        ask, by `protocols`, of which `file` asks none."""
        self._objects = objects
        self._max_bytes = max_bytes
        self._git_hosts = git_hosts
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
        self._check_allowed(url)
        await self._git(folder, "init", "--quiet", "--template=")
        # A server may offer anything: no hook, no submodule, no filter, no other protocol or server, nothing asked of a user.
        await self._git(folder, "fetch", "--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules", "--", url, ref)
        await self._git(folder, "-c", "advice.detachedHead=false", "checkout", "--quiet", "--no-recurse-submodules", "FETCH_HEAD")
        commit = await self._git(folder, "rev-parse", "HEAD")
        await asyncio.to_thread(trees.remove, folder / ".git")
        await asyncio.to_thread(_check, folder, self._max_bytes * 10)
        return commit

    def _check_allowed(self, url: str) -> None:
        """Raises Invalid for a URL of another protocol, or of a server that the operator has not named."""
        parts = urlsplit(url)
        if parts.scheme not in self._protocols:
            raise Invalid(f"git sources are fetched by {', '.join(self._protocols)}, not from {url!r}: not allowed")
        if parts.scheme == "file":
            return
        try:
            server = destination(parts.netloc.rpartition("@")[2], HTTPS if parts.scheme == "https" else HTTP)
        except ValueError as exc:
            raise Invalid(f"git: {exc}") from None
        if server not in self._git_hosts:
            raise Invalid(f"git sources from {server} are not allowed: {SETTING} of the trainer does not name it")

    async def _git(self, folder: Path, *words: str) -> str:
        options = ["protocol.allow=never", "core.hooksPath=/dev/null", "core.symlinks=true", "core.fsmonitor=false", "gc.auto=0"]
        options += ["http.followRedirects=false", "submodule.recurse=false", "core.attributesFile=/dev/null", "credential.helper="]
        options += [f"protocol.{name}.allow=always" for name in self._protocols]
        environment = {
            **{name: os.environ[name] for name in _INHERITED if name in os.environ},
            # No configuration of the machine or the user: a filter, a helper or a credential there is not for whoever trains.
            "HOME": str(folder),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "/bin/true",
            "GIT_ALLOW_PROTOCOL": ":".join(self._protocols),
            "GIT_LFS_SKIP_SMUDGE": "1",
        }
        configured = [word for option in options for word in ("-c", option)]
        try:
            # A pack may be as large as its server likes; a larger file than this ends git.
            limited = ["prlimit", f"--fsize={self._max_bytes * 10}", "--"]
            code, said = await output_of([*limited, "git", *configured, *words], environment, _GIT_S, folder)
        except TimeoutError:
            raise Unavailable(f"git did not end within {_GIT_S:g} s") from None
        if code != 0:
            text = said.strip()[-500:]
            if -code == signal.SIGXFSZ or any(sign in text for sign in _TOO_LARGE):
                raise TooLarge(f"the repository has a file or a pack of more than {self._max_bytes * 10} bytes")
            if any(sign in text for sign in _PASSING) and not any(sign in text for sign in _LASTING):
                raise Unavailable(f"git: {text}")
            raise Invalid(f"git: {text}")
        return said.strip()


def unpack(archive: Path, folder: Path, max_bytes: int, max_files: int = MAX_FILES) -> None:
    """Unpacks a tar.gz into an existing folder. Blocks.

    Only plain files and folders below it are accepted: no absolute path, no `..`, no link, no device, nothing deeper than MAX_DEPTH;
    raises Invalid otherwise, and TooLarge beyond `max_bytes` unpacked or `max_files` files and folders.
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
        # An error of the machine, but for names that cannot be (a file where a folder is needed, a name given twice or too long).
        impossible = isinstance(exc, FileExistsError | NotADirectoryError | IsADirectoryError) or (
            isinstance(exc, OSError) and exc.errno == errno.ENAMETOOLONG
        )
        if isinstance(exc, OSError) and exc.errno is not None and not impossible:
            raise
        raise Invalid(f"the source is not a tar.gz that can be unpacked: {exc}") from exc


def _safe(member: tarfile.TarInfo) -> str:
    name = member.name.removeprefix("./").rstrip("/") or "."
    plain = name == "." or not any(part in ("", ".", "..") for part in name.split("/"))
    if not plain or "\\" in name or "\x00" in name:
        raise Invalid(f"the source holds {member.name!r}, which is not a path below its folder")
    if name.count("/") >= MAX_DEPTH:
        raise _too_deep(name)
    if not member.isfile() and not member.isdir():
        raise Invalid(f"the source holds {member.name!r}, which is neither a file nor a folder")
    return name


def _write(content: IO[bytes], target: Path, mode: int) -> None:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with open(descriptor, "wb") as file:
        while chunk := content.read(_CHUNK):
            file.write(chunk)


def _too_deep(name: str) -> Invalid:
    return Invalid(f"the source holds {name[:100]!r} and so on, more than {MAX_DEPTH} folders within one another")


def _check(folder: Path, max_bytes: int) -> None:
    """Raises TooLarge for a fetched source of too many bytes or files, Invalid for one that is too deep. Blocks."""
    size = count = 0
    top = str(folder)
    for parent, folders, files in os.walk(folder):
        inside = parent[len(top) + 1 :]
        if inside.count(os.sep) + bool(inside) >= MAX_DEPTH and (files or folders):
            raise _too_deep(inside)
        count += len(files) + len(folders)
        size += sum(os.lstat(os.path.join(parent, name)).st_size for name in files)
    if count > MAX_FILES or size > max_bytes:
        raise TooLarge(f"the source has {count} files of {size} bytes; at most {MAX_FILES} files and {max_bytes} bytes")
