"""Locks the current process into a file system that holds Python, its packages and one task, and takes all its privileges away.

It must be called in new user, mount, process and network namespaces (`unshare`), in which it may mount. What is not bound in here does not
exist in there: no home, no state, no secrets, no other task. Sources: mount_namespaces(7), pivot_root(2), user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC = 32, 4096, 16384
_MNT_DETACH = 2
_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 38, 24
_CAPABILITY_VERSION_3 = 0x20080522
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/sys/devices/system/cpu")
"""Where the libraries of the system are, and what onnxruntime asks of the processor; those that exist are seen, read-only."""

_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_libc = ctypes.CDLL(None, use_errno=True)


def python_paths() -> list[str]:
    """What this Python needs to run: its installation, its environment, and the folder that this package is in."""
    return [sys.base_prefix, sys.base_exec_prefix, sys.prefix, str(Path(__file__).parent.parent)]


def enter(task: Path, readonly: Iterable[str] = ()) -> tuple[Path, Path]:
    """Makes `task` all that there is besides Python and `readonly`; returns where its folders `in` and `out` are then.

    `task/in` can be read and `task/out` written; `task/root` is where the new root is put together. There is no way back. Raises OSError.
    """
    root = task / "root"
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    # Before the paths, some of which may lie below the /tmp of the outside.
    (root / "tmp").mkdir()
    _mount("tmpfs", root / "tmp", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "size=16m,mode=0700")
    for path in _outermost([*SYSTEM, *python_paths(), *readonly]):
        _show(Path(path), root)
    for device in _DEVICES:
        _bind(Path(device), root)
    _bind(Path("/proc"), root)
    for name, writable in (("in", False), ("out", True)):
        target = root / "task" / name
        target.mkdir(parents=True)
        _mount(str(task / name), target, "", _MS_BIND | _MS_REC)
        if not writable:
            _make_readonly(target)
    os.chdir(root)
    _check(_libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount of the old root")
    os.chdir("/")
    _mount("", Path("/"), "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    drop_privileges()
    return Path("/task/in"), Path("/task/out")


def drop_privileges() -> None:
    """Gives up every capability for good, also for programs that would be started. Raises OSError."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # past the last one that this kernel has
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, nothing), "capset")


def _outermost(paths: Iterable[str]) -> list[str]:
    """The existing ones of these paths, without those that are below another one. Links stay as they are."""
    found = sorted({os.path.normpath(path) for path in paths if os.path.lexists(path)})
    kept: list[str] = []
    for path in found:
        if not any(path.startswith(outer + "/") for outer in kept):
            kept.append(path)
    return kept


def _show(path: Path, root: Path) -> None:
    """Lets `path` be seen under the new root, read-only; what a link points at as well."""
    target = root / path.relative_to("/")
    if path.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.readlink(path))
        real = path.resolve()
        if real.exists() and not (root / real.relative_to("/")).exists():
            _show(real, root)
        return
    _make_readonly(_bind(path, root))


def _bind(path: Path, root: Path) -> Path:
    target = root / path.relative_to("/")
    if path.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    _mount(str(path), target, "", _MS_BIND | _MS_REC)
    return target


def _make_readonly(target: Path) -> None:
    # In a user namespace the flags that the mount has already must be kept.
    kept = os.statvfs(target).f_flag & (_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _mount("", target, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | kept)


def _mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    result = _libc.mount(source.encode(), str(target).encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _check(result, f"mount of {source or target} at {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
