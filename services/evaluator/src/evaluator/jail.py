"""Locks the current process into a file system that holds Python, its packages and one task, and takes all its privileges away.

It must be called in new user, mount, process and network namespaces (`unshare`), in which it may mount. What is not bound in here does not
exist in there: no home, no state, no secrets, no other task. Sources: mount_namespaces(7), pivot_root(2), user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC = 32, 4096, 16384
_MNT_DETACH = 2
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442  # the same on every architecture
_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 38, 24
_LAST_CAPABILITY = 63
_CAPABILITY_VERSION_3 = 0x20080522
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/sys/devices/system/cpu")
"""Where the libraries of the system are, and what onnxruntime asks of the processor; those that exist are seen, read-only."""

PROCESSES = 64
"""Processes and threads at once: the limit of memory is one of each process, so this bounds them all."""

_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


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
    # In further namespaces it would have capabilities again. What is forbidden here its owner could allow again, so it is read-only.
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    _bind(Path("/proc"), root)
    _make_readonly(_bind(Path("/proc/sys"), root))
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
    # Counted within this namespace (since Linux 5.14), so that what else the user runs does not count.
    resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))
    drop_privileges()
    return Path("/task/in"), Path("/task/out")


def drop_privileges() -> None:
    """Gives up every capability for good, also for programs that would be started. Raises OSError."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    for capability in range(_LAST_CAPABILITY + 1):
        # EINVAL: this kernel does not know it.
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0 and ctypes.get_errno() != errno.EINVAL:
            _check(-1, f"drop of capability {capability}")
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
    # With everything that is mounted below it, which a remount would leave as it is.
    attributes = _MountAttr(attr_set=_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV)
    size = ctypes.sizeof(attributes)
    result = _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE, ctypes.byref(attributes), size)
    _check(result, f"protection of {target} (needs Linux 5.12 or newer)")


def _mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    result = _libc.mount(source.encode(), str(target).encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _check(result, f"mount of {source or target} at {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
