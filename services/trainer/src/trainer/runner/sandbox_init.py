"""The first process inside a sandbox: builds a root of its own, locks itself out of everything else, and runs one command in it.

Started in new namespaces (see `run` in sandbox.py) as `python -I -S sandbox_init.py SPEC RESULT_FD [LISTENER_FD]`. It uses the standard
library alone, because what it runs as must not depend on anybody's environment. The root holds only what SPEC (JSON, see
`_spec` in sandbox.py) names. It goes on as process 1 of the namespace: it reaps, and when the command ends nothing else survives.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import socket
import struct
import sys
from typing import Any, NoReturn

# linux/mount.h, linux/prctl.h
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 2, 4, 8, 32, 4096, 16384
MS_RDONLY = 1
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
SYS_MOUNT_SETATTR = 442  # the same on every architecture
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
KEYCTL_JOIN_SESSION_KEYRING = 1
LAST_CAPABILITY = 63
SIOCSIFFLAGS, IFF_UP = 0x8914, 1  # linux/sockios.h, linux/if.h

WORK, HOME, SOURCE = "/headrace/work", "/headrace/home", "/headrace/source"
"""Where a command starts and may write, its home, and the source as it was given, read-only. Named so that no path of the outside that
must be seen at its own place lies below them."""

SPACE = (
    ("work", WORK, 0o755),
    ("home", HOME, 0o755),
    ("tmp", "/tmp", 0o1777),  # noqa: S108 - these are the sandbox's own
    ("shm", "/dev/shm", 0o1777),  # noqa: S108
)
"""What a command may write to, all on one file system of limited size: name there, place, mode."""

PROTECTED = ("/proc/sys", "/proc/irq", "/proc/sysrq-trigger")
TCP_BUFFER = "4096 131072 262144"  # least, initial and most bytes

DEVICES = ("null", "zero", "full", "random", "urandom")

libc = ctypes.CDLL(None, use_errno=True)


class MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check(libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def bind(source: str, target: str, *, writable: bool, devices: bool = False) -> None:
    """Makes a file or folder visible at `target`, with everything mounted below it, and never more than read unless `writable`."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "a"):
            pass
    mount(source, target, None, MS_BIND | MS_REC)
    attributes = MountAttr(attr_set=MOUNT_ATTR_NOSUID | (0 if devices else MOUNT_ATTR_NODEV) | (0 if writable else MOUNT_ATTR_RDONLY))
    path = os.fsencode(target)
    result = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes))
    check(result, f"protect {target} (needs Linux 5.12 or newer)")


def open_loopback(spec: dict[str, Any], way_out: int | None) -> None:
    """Brings the loopback of this network up, all that there is in it, and hands a socket that listens on it through `way_out`: whoever
    has that serves here without being here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    if way_out is not None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener, socket.socket(fileno=way_out) as line:
            listener.bind(("127.0.0.1", spec["proxy_port"]))
            listener.listen(128)
            socket.send_fds(line, [b"listener"], [listener.fileno()])


def forbid(name: str) -> None:
    """Sets a limit of these namespaces to 0."""
    with open(f"/proc/sys/{name}", "w") as file:
        file.write("0")


def limit_tcp_buffers() -> None:
    """What one connection of this network may have in flight in the kernel, which is nobody's memory."""
    for name in ("tcp_rmem", "tcp_wmem"):
        with open(f"/proc/sys/net/ipv4/{name}", "w") as file:
            file.write(TCP_BUFFER)


def build_root(spec: dict[str, Any]) -> None:
    """Makes `spec["root"]` a root folder that holds what the spec names and nothing else, and moves into it."""
    root = spec["root"]
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=755")
    for path, target in spec["links"].items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(target, root + path)
    for path, text in spec["files"].items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        with open(root + path, "w") as file:
            file.write(text)
    # One file system of limited size for all that the command writes: then "disk full" is real, and nobody else's.
    space = f"{root}/headrace/space"
    os.makedirs(space)
    mount("tmpfs", space, "tmpfs", MS_NOSUID | MS_NODEV, f"size={spec['space_bytes']},mode=755")
    for name, target, mode in SPACE:
        os.makedirs(f"{space}/{name}")
        os.chmod(f"{space}/{name}", mode)
        os.makedirs(root + target, exist_ok=True)
        mount(f"{space}/{name}", root + target, None, MS_BIND)
    for source, target, writable in spec["binds"]:
        bind(source, root + target, writable=writable)
    for name in DEVICES:
        bind(f"/dev/{name}", f"{root}/dev/{name}", writable=True, devices=True)
    for device in spec["devices"]:
        bind(device, root + device, writable=True, devices=True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{root}/dev/{name}")
    os.symlink("/proc/self/fd", f"{root}/dev/fd")
    os.makedirs(f"{root}/proc")
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    check(libc.syscall(SYS_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "leave the old root")
    os.chdir("/")
    mount("tmpfs", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def copy_source(source: str) -> None:
    """Copies the read-only source to where the command works, so that it may write beside its own files."""
    for entry in os.scandir(source):
        target = os.path.join(WORK, entry.name)
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, target, symlinks=True)
        else:
            shutil.copy2(entry.path, target, follow_symlinks=False)


def own_keyring() -> None:
    """Leaves the session keyring of whoever started the trainer. A kernel or container without keyrings has none to leave."""
    if libc.syscall(SYS_KEYCTL[platform.machine()], KEYCTL_JOIN_SESSION_KEYRING, None) < 0:
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EPERM):
            raise OSError(number, "a session keyring of its own")


def become(spec: dict[str, Any]) -> NoReturn:
    """The command's own process: no privilege, no more than its limits, only the environment that it was given."""
    os.setsid()
    own_keyring()
    for name, limit in spec["limits"].items():
        number = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(number)[1]
        value = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(number, (value, value))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # should the machine run out of memory, this goes before any service
    os.umask(0o022)
    os.chdir(spec["folder"])
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signal_number, signal.SIG_DFL)
    # Root of its own namespace could still mount there; without capabilities it cannot, nor can anything that it starts get them.
    for capability in range(LAST_CAPABILITY + 1):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0 and ctypes.get_errno() != errno.EINVAL:
            raise OSError(ctypes.get_errno(), "drop a capability")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    os.closerange(3, 1 << 16)
    os.execvpe(spec["command"][0], spec["command"], spec["environment"])  # noqa: S606 - the very purpose


def start(spec: dict[str, Any]) -> int:
    """Forks the command; its pid. A command that cannot be started ends with code 127, as in a shell, and says why in the log."""
    pid = os.fork()
    if pid == 0:
        try:
            become(spec)
        except OSError as exc:
            os.write(2, f"cannot start {spec['command'][0]}: {exc}\n".encode())
        finally:
            os._exit(127)
    return pid


def reap(pid: int) -> int:
    """Waits for the command, and for every orphan that its children leave; the command's wait status."""
    while True:
        ended, status = os.wait()
        if ended == pid:
            return status


def main() -> None:
    spec_file, result_fd = sys.argv[1], int(sys.argv[2])
    way_out = int(sys.argv[3]) if len(sys.argv) > 3 else None
    os.set_inheritable(result_fd, False)
    with open(spec_file) as file:
        spec = json.load(file)
    result: dict[str, Any] = {}
    try:
        open_loopback(spec, way_out)
        build_root(spec)
        # In further namespaces it would have capabilities again, and with them file systems that nobody limits.
        forbid("user/max_user_namespaces")
        with contextlib.suppress(PermissionError):  # nobody but the machine's root may before Linux 5.19
            forbid("kernel/shmmni")  # shared memory of System V is counted nowhere
        limit_tcp_buffers()
        # Some limits are their owner's to raise again, without any capability; and the machine's root is root here when it is a trainer.
        for path in PROTECTED:
            if os.path.exists(path):
                bind(path, path, writable=False)
        copy_source(SOURCE) if spec["copies_source"] else None
        status = reap(start(spec))
        result["code"] = os.waitstatus_to_exitcode(status)
        space = os.statvfs(WORK)
        result["free_bytes"] = space.f_bavail * space.f_frsize
    except OSError as exc:
        result["error"] = f"{exc.strerror or exc}"
        result["full"] = exc.errno == errno.ENOSPC
    except shutil.Error as exc:
        result["error"] = str(exc)[:500]
        result["full"] = os.strerror(errno.ENOSPC) in str(exc)
    os.write(result_fd, json.dumps(result).encode())


if __name__ == "__main__":
    main()
