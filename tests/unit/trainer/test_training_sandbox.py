"""The sandbox, the log, and how an end is judged. The sandbox is made of the kernel's own namespaces: no server is needed."""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import signal
import sys
import threading
from pathlib import Path

import psutil
import pytest
from trainer.runner import memory, sandbox, sandbox_init
from trainer.runner.attempt import judge
from trainer.runner.child import Child, output_of
from trainer.runner.log import Log
from trainer.runner.sandbox import Command, Ended, Limits
from trainer.runner.sandbox_init import HOME, SOURCE, WORK

LIMITS = Limits(memory_bytes=512 * 2**20, disk_bytes=8 * 2**20, timeout_s=60)
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8"}


async def run(tmp_path: Path, *words: str, limits: Limits = LIMITS, **fields: object) -> tuple[Ended, str]:
    said = bytearray()
    command = Command(words, ENVIRONMENT, **fields)  # type: ignore[arg-type]  # fields by name
    ended = await sandbox.run(command, limits, tmp_path / "sandbox", said.extend)
    return ended, said.decode()


def python(program: str) -> list[str]:
    return [sandbox.BASE_PYTHON, "-I", "-S", "-c", program]


async def test_this_machine_can_make_sandboxes() -> None:
    await sandbox.check()


async def test_a_command_sees_its_source_and_may_write_beside_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "data.txt").write_text("hello")
    ended, said = await run(
        tmp_path, "sh", "-c", f"pwd; cat sub/data.txt; echo; echo x > sub/new; cat sub/new; ls {SOURCE}/sub", source=source
    )
    assert (ended.code, said.split()) == (0, [WORK, "hello", "x", "data.txt"])
    assert not (source / "sub" / "new").exists()


async def test_a_command_sees_nothing_of_the_outside(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t")
    os.environ["HEADRACE_TEST_SECRET"] = "s3cr3t"
    try:
        program = (
            f"ls -a / /root /home /tmp 2>/dev/null; cat {secret}; env; cat /proc/*/environ; cat /etc/shadow; ls /proc | grep -c '^[0-9]'"
        )
        ended, said = await run(tmp_path, "sh", "-c", program)
    finally:
        del os.environ["HEADRACE_TEST_SECRET"]
    assert "s3cr3t" not in said
    assert f"cat: {secret}: No such file or directory" in said
    assert "cat: /etc/shadow: No such file or directory" in said
    assert f"HOME={HOME}" in said
    assert int(said.splitlines()[-1]) < 10  # its own processes only
    assert ended.code == 0


@pytest.mark.parametrize("path", ["/usr/x", "/x", "/etc/x", f"{SOURCE}/x", "/sys/x", "/dev/x"])
async def test_a_command_changes_nothing_outside_its_own_space(tmp_path: Path, path: str) -> None:
    (tmp_path / "source").mkdir()
    ended, said = await run(tmp_path, "touch", path, source=tmp_path / "source")
    assert ended.code == 1
    assert "Read-only file system" in said or "Permission denied" in said


async def test_a_command_has_no_privileges_and_gets_none(tmp_path: Path) -> None:
    program = (
        "grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status; mount -t tmpfs none /tmp; cat /proc/1/environ; kill -9 1; echo alive"
    )
    _, said = await run(tmp_path, "sh", "-c", program)
    assert "CapEff:\t0000000000000000" in said
    assert "CapBnd:\t0000000000000000" in said
    assert "NoNewPrivs:\t1" in said
    assert "alive" in said
    assert said.count("denied") >= 1


async def test_a_command_makes_no_further_namespaces_and_cannot_allow_itself_to(tmp_path: Path) -> None:
    program = """
cat /proc/sys/user/max_user_namespaces /proc/sys/kernel/shmmni
echo 10 > /proc/sys/user/max_user_namespaces; echo 10 > /proc/sys/kernel/shmmni
for one in --user "--user --map-root-user --mount" --mount --net --pid --ipc --uts; do unshare $one true && echo "made $one"; done
ipcmk --shmem 4096 && echo "made shared memory"
cat /proc/sys/user/max_user_namespaces /proc/sys/kernel/shmmni
"""
    _, said = await run(tmp_path, "sh", "-c", program)
    assert "made" not in said.replace("made shared", "MADE shared")
    assert "MADE" not in said
    lines = said.splitlines()
    assert lines[:2] == lines[-2:] == ["0", "0"]
    assert said.count("Read-only file system") == 2
    assert said.count("unshare failed") == 7
    assert "ipcmk: create share memory failed" in said


async def test_memory_of_all_processes_together_is_limited(tmp_path: Path) -> None:
    limits = Limits(memory_bytes=96 * 2**20, disk_bytes=2**20, timeout_s=60)
    program = "import os, time\nos.fork()\nblock = bytearray(70_000_000)\ntime.sleep(600)"
    ended, _ = await run(tmp_path, *python(program), limits=limits, visible=sandbox.visible_python(Path(sys.prefix)))
    assert ended.killed.startswith("out of memory: used ")
    assert ended.killed.endswith("of 96.0 MiB")
    assert ended.peak_memory_bytes > 96 * 2**20


@pytest.mark.parametrize("mapped", [False, True])
async def test_files_in_memory_count_though_nobody_has_mapped_them(tmp_path: Path, mapped: bool) -> None:
    limits = Limits(memory_bytes=96 * 2**20, disk_bytes=2**20, timeout_s=60)
    program = """
import mmap, os, sys, time
file = os.memfd_create("hidden")
for _ in range(120):
    os.write(file, bytes(1 << 20))
if sys.argv[1] == "True":
    kept = mmap.mmap(file, 120 << 20)
    sum(kept[n] for n in range(0, 120 << 20, 4096))
    os.close(file)
time.sleep(600)
"""
    ended, _ = await run(tmp_path, *python(program), str(mapped), limits=limits, visible=sandbox.visible_python(Path(sys.prefix)))
    assert ended.killed.startswith("out of memory: used ")
    assert ended.killed.endswith("of 96.0 MiB")


async def test_what_processes_share_is_counted_once(tmp_path: Path) -> None:
    """Four processes that have the same 60 MB, as a file in memory and as pages of their common parent."""
    limits = Limits(memory_bytes=192 * 2**20, disk_bytes=2**20, timeout_s=60)
    program = """
import mmap, os, time
file = os.memfd_create("shared", 0)
os.truncate(file, 60_000_000)
shared = mmap.mmap(file, 60_000_000)
for n in range(0, 60_000_000, 4096):
    shared[n] = 1
block = bytearray(60_000_000)
children = []
for _ in range(3):
    if not (child := os.fork()):
        sum(shared[n] + block[n] for n in range(0, 60_000_000, 4096))
        time.sleep(600)
    children.append(child)
until = time.monotonic() + 30
def resident(pid):
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * 4096
while min(map(resident, children)) < 110_000_000:
    assert time.monotonic() < until
    time.sleep(0.02)
time.sleep(0.5)  # long enough for the limit to be looked at
print("alive")
"""
    ended, said = await run(tmp_path, *python(program), limits=limits, visible=sandbox.visible_python(Path(sys.prefix)))
    assert (ended.code, ended.killed, said) == (0, "", "alive\n")
    assert 120_000_000 < ended.peak_memory_bytes < limits.memory_bytes


async def test_a_disk_that_is_full_is_really_full(tmp_path: Path) -> None:
    ended, said = await run(tmp_path, "sh", "-c", "head -c 20000000 /dev/zero > big; echo code $?; wc -c < big")
    assert "No space left on device" in said
    assert int(said.split()[-1]) <= LIMITS.disk_bytes
    assert ended.full


async def test_a_source_that_does_not_fit_is_counted_apart(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "large").write_bytes(bytes(16 * 2**20))
    ended, said = await run(tmp_path, "sh", "-c", "wc -c < large; head -c 7000000 /dev/zero > more && echo fits", source=source)
    assert (ended.code, said.split()) == (0, [str(16 * 2**20), "fits"])


async def test_time_is_limited(tmp_path: Path) -> None:
    ended, _ = await run(tmp_path, "sleep", "600", limits=Limits(2**30, 2**20, 0.2))
    assert ended.killed == "timed out after 0.2 s"


async def test_time_is_limited_also_while_the_memory_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(sandbox, "SLOW_S", 60.0)
    monkeypatch.setattr(memory, "used", lambda _pids, _limit: int(over.wait(60)))
    try:
        ended, _ = await run(tmp_path, "sleep", "600", limits=Limits(2**30, 2**20, 0.5))
    finally:
        over.set()
    assert ended.killed == "timed out after 0.5 s"


async def test_what_cannot_be_watched_in_time_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(sandbox, "SLOW_S", 0.5)
    monkeypatch.setattr(memory, "used", lambda _pids, _limit: int(over.wait(60)))
    try:
        ended, _ = await run(tmp_path, "sleep", "600")
    finally:
        over.set()
    assert ended.killed.startswith("its memory could not be watched")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (
            "import os\nfor _ in range(20): os.fork() or (kept.extend(os.dup(0) for _ in range(4_000)), time.sleep(600))",
            "too many open files",
        ),
        ("import socket\nkept.extend(socket.socketpair() for _ in range(300))", "too many sockets: "),
        ("import os\nfor _ in range(600): os.fork() or time.sleep(600)", "too many processes: "),
    ],
)
async def test_too_much_to_watch_is_not_allowed(tmp_path: Path, program: str, why: str) -> None:
    program = f"import time\nkept = []\n{program}\ntime.sleep(600)"
    limits = Limits(memory_bytes=8 * 2**30, disk_bytes=2**20, timeout_s=60)
    words = [sandbox.BASE_PYTHON, "-I", "-c", program]
    ended, said = await run(tmp_path, *words, limits=limits, visible=sandbox.visible_python(Path(sys.prefix)))
    assert ended.killed.startswith(why), (ended, said)


async def test_a_command_has_a_session_keyring_of_its_own(tmp_path: Path) -> None:
    number = sandbox_init.SYS_KEYCTL[platform.machine()]
    libc = ctypes.CDLL(None)
    ours = libc.syscall(number, sandbox_init.KEYCTL_JOIN_SESSION_KEYRING, None)  # else there is perhaps none to be inherited
    program = f"import ctypes; print(ctypes.CDLL(None).syscall({number}, 0, -3, 0))"  # KEYCTL_GET_KEYRING_ID of the session
    _, said = await run(tmp_path, *python(program), visible=sandbox.visible_python(Path(sys.prefix)))
    assert ours == -1 or int(said) not in (ours, -1)  # a machine may have no keyrings


async def test_open_files_of_a_process_are_limited_and_the_machines_switches_out_of_reach(tmp_path: Path) -> None:
    program = """
ulimit -Hn; cat /proc/sys/net/ipv4/tcp_rmem
for file in /proc/sysrq-trigger $(find /proc/irq -type f | head -n 3) /proc/sys/net/ipv4/tcp_rmem; do
  [ ! -e $file ] || if true >> $file; then echo open; fi
done
grep -E ' /proc/(sys|irq) ro,' /proc/self/mountinfo | wc -l
"""
    ended, said = await run(tmp_path, "sh", "-c", program)
    lines = [line for line in said.splitlines() if not line.startswith("sh:")]
    assert ended.code == 0
    assert [line.split() for line in lines] == [["4096"], ["4096", "131072", "262144"], ["2"]], said


async def test_what_a_command_leaves_running_is_gone_with_it(tmp_path: Path) -> None:
    mark = f"7{os.getpid()}"
    ended, said = await run(tmp_path, "sh", "-c", f"(setsid sleep {mark} &); sleep 0.1; echo started")
    assert (ended.code, said) == (0, "started\n")
    assert not [process for process in psutil.process_iter() if mark in _words(process)]


async def test_a_command_that_is_cancelled_is_gone(tmp_path: Path) -> None:
    mark = f"8{os.getpid()}"
    running = asyncio.create_task(run(tmp_path, "sleep", mark))
    async with asyncio.timeout(30):
        while not any(_words(process)[-2:] == ["sleep", mark] for process in psutil.process_iter()):  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not [process for process in psutil.process_iter() if mark in _words(process)]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


async def test_signals_and_missing_programs_are_told_as_they_are(tmp_path: Path) -> None:
    ended, _ = await run(tmp_path, "sh", "-c", "kill -SEGV $$")
    assert ended.code == -signal.SIGSEGV
    ended, said = await run(tmp_path, "nosuchprogram")
    assert ended.code == 127
    assert said.startswith("cannot start nosuchprogram: ")


async def test_children_are_seen_to_their_end_many_at_once() -> None:
    async def one(number: int) -> None:
        assert await output_of(["sh", "-c", f"echo {number}; exit 3"], ENVIRONMENT, 30) == (3, f"{number}\n")

    await asyncio.gather(*(one(number) for number in range(20)))
    with pytest.raises(TimeoutError):
        await output_of(["sleep", "600"], ENVIRONMENT, 0.1)
    child = Child(["sleep", "600"], captured=False)
    waiting = [asyncio.create_task(child.wait()) for _ in range(3)]
    await child.end()
    assert await asyncio.gather(*waiting) == [-signal.SIGKILL] * 3


@pytest.mark.parametrize(
    ("ended", "tail", "reason", "users_fault"),
    [
        (Ended(code=1), "one\ntwo", "exit code 1\none\ntwo", True),
        (Ended(code=1), "", "exit code 1", True),
        (Ended(code=-11), "", "killed by SIGSEGV", True),
        (Ended(code=-9), "", "killed by SIGKILL, perhaps because the machine was out of memory", True),
        (Ended(code=-9, killed="out of memory: used 2.0 GiB of 1.0 GiB"), "x", "out of memory: used 2.0 GiB of 1.0 GiB\nx", True),
        (Ended(code=1, full=True), "x", "disk full: no space left of 8.0 MiB\nx", True),
        (
            Ended(code=1),
            "OSError: [Errno 28] No space left on device",
            "disk full: no space left of 8.0 MiB\nOSError: [Errno 28] No space left on device",
            True,
        ),
        (Ended(error="mount /x: Operation not permitted"), "", "mount /x: Operation not permitted", False),
        (Ended(error="x", full=True), "", "disk full: 8.0 MiB are too few for the source", True),
    ],
)
def test_an_end_is_judged_with_its_reason(ended: Ended, tail: str, reason: str, users_fault: bool) -> None:
    outcome = judge(ended, LIMITS, tail)
    assert (outcome.succeeded, outcome.reason, outcome.users_fault) == (False, reason, users_fault)


def test_an_end_that_is_good() -> None:
    assert judge(Ended(code=0), LIMITS, "x").succeeded


def test_a_log_is_cut_at_its_limit_and_remembers_its_last_lines(tmp_path: Path) -> None:
    log = Log(tmp_path / "a" / "log.txt", max_bytes=10)
    log.note("begin")
    for number in range(5_000):
        log.write(f"line {number}\n".encode())
    assert log.tail().splitlines() == [f"line {number}" for number in range(4_980, 5_000)]
    log.close()
    text = log.file.read_text()
    assert text.startswith("[headrace] begin\nline 0\nlin\n[headrace] the log is full")
    assert text.endswith(f"[headrace] {sum(len(f'line {n}') + 1 for n in range(5_000)) - 10} bytes were left out\n")
    second = Log(log.file, max_bytes=100)
    second.write(b"\xff\x00 again")
    assert second.tail() == "\ufffd again"
    second.forget_tail()
    assert second.tail() == ""
    second.copy(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"\xff\x00 again"
    second.close()
