"""The namespaces and limits around a generated program, made by the process that runs in them.

A root of read-only system libraries and one small folder, a user without rights on the host,
limits, and a filter that refuses the system calls which lead out. Raises OSError where the system
does not let us. Standard library only; Linux 5.14 counts processes for each user namespace apart.
"""

import ctypes
import errno
import os
import resource
import signal
import struct
import sys

BOX = "/box"  # the program's own folder
OUTSIDE = 65_534  # the user that a sandbox of root's is on the host
INSIDE = 1_000
PROCESSES, FILES, FOLDER = 32, 64, 32  # at most: threads count as processes; megabytes of folder
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    *(0x20000, 0x2000000, 0x4000000, 0x8000000),
    *(0x10000000, 0x20000000, 0x40000000),
)
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = (
    *(0x1, 0x2, 0x4, 0x8, 0x20),
    *(0x1000, 0x4000, 0x40000),
)
DETACH, RECURSIVE, HERE = 2, 0x8000, -100
SET_PDEATHSIG, SET_DUMPABLE, SET_SECCOMP, CAPBSET_DROP, SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
ARENA_MAX = -8
MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

# By name, the numbers on x86-64 and aarch64
with open(os.path.join(os.path.dirname(__file__), "refused_calls.txt"), encoding="ascii") as table:
    rows = [line.split() for line in table if not line.startswith("#")]
REFUSED = {name: (int(x86_64), int(aarch64)) for name, x86_64, aarch64 in rows}
CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
PRLIMIT = {"x86_64": 302, "aarch64": 261}
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF instructions
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000

MACHINE = os.uname().machine
LIBC = ctypes.CDLL(None, use_errno=True)


def _check(what: str, result: int) -> None:
    """Raise OSError, naming what was tried, where a call of the C library failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount `source` on `target`, which must exist."""
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    result = LIBC.mount(*texts, ctypes.c_ulong(flags), options.encode())
    _check(f"mount {target}", result)


def die_with_parent() -> None:
    """Have Linux kill this process when its parent ends; a change of user takes that back."""
    if sys.platform == "linux":
        LIBC.prctl(SET_PDEATHSIG, signal.SIGKILL)


def enter(seconds: float) -> int:
    """Enter the sandbox: return in its first process, with a descriptor of its /proc.

    The process that called stays outside, kills the sandbox when `seconds` are over, and ends with
    its exit status.
    """
    if MACHINE not in AUDIT:
        raise OSError(errno.ENOSYS, f"no filter of system calls for {MACHINE}")
    root = os.geteuid() == 0
    if not root:
        _new_user("/proc/self", 0, os.geteuid(), os.getegid())
    _check("unshare", LIBC.unshare(NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP))
    child = os.fork()
    if child:  # when this process ends, the kernel ends all in the sandbox
        die_with_parent()
        signal.signal(signal.SIGALRM, lambda number, frame: os.kill(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.setsid()
    proc = _new_root()
    if root:  # any other user has no rights to give up
        os.setgroups([])
        os.setresgid(OUTSIDE, OUTSIDE, OUTSIDE)
        os.setresuid(OUTSIDE, OUTSIDE, OUTSIDE)
    LIBC.prctl(SET_DUMPABLE, 1)  # else the files in /proc/self would be root's
    _new_user("self", INSIDE, os.geteuid(), os.getegid(), proc)
    die_with_parent()
    return proc


def _new_user(me: str, inside: int, user: int, group: int, folder: int | None = None) -> None:
    """Make a user namespace in which `user` and `group` are called `inside`."""
    _check("unshare", LIBC.unshare(NEWUSER))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside} {user} 1"),
        ("gid_map", f"{inside} {group} 1"),
    ):
        file = os.open(f"{me}/{name}", os.O_WRONLY, dir_fd=folder)
        os.write(file, text.encode())
        os.close(file)


def _new_root() -> int:
    """Replace the file system by system libraries and an empty folder.

    Returns a descriptor of a /proc that has no path. The new root is mounted over /tmp, which every
    system has, and then takes the place of the old one.
    """
    _mount("none", "/", None, REC | PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    _check("pivot_root", LIBC.syscall(PIVOT_ROOT[MACHINE], b"/tmp", b"/tmp/old"))
    os.chdir("/")
    library = os.path.dirname(os.path.realpath(os.__file__))
    for path in dict.fromkeys((*SYSTEM, library)):  # each at the same path, read-only
        if os.path.islink(f"/old{path}"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(os.readlink(f"/old{path}"), path)
        elif os.path.isdir(f"/old{path}") and not os.path.isdir(path):
            os.makedirs(path, exist_ok=True)
            _mount(f"/old{path}", path, None, BIND | REC)
            # mount_setattr(2), which reaches all that is mounted below as well
            attributes = struct.pack("QQQQ", RDONLY | NOSUID | NODEV, 0, 0, 0)
            arguments = (HERE, path.encode(), RECURSIVE, attributes, ctypes.c_size_t(32))
            _check(f"read-only {path}", LIBC.syscall(MOUNT_SETATTR, *arguments))
    for name in ("site-packages", "dist-packages"):
        if os.path.isdir(f"{library}/{name}"):
            _mount("tmpfs", f"{library}/{name}", "tmpfs", RDONLY | NOSUID | NODEV, "size=4k")
    os.mkdir("/dev")
    os.close(os.open("/dev/null", os.O_CREAT))
    _mount("/old/dev/null", "/dev/null", None, BIND)
    os.makedirs(BOX, exist_ok=True)
    _mount("tmpfs", BOX, "tmpfs", NOSUID | NODEV, f"size={FOLDER}m,nr_inodes=4096,mode=777")
    os.makedirs("/proc", exist_ok=True)
    _mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    for path in ("/proc", "/old"):
        _check(f"umount {path}", LIBC.umount2(path.encode(), DETACH))
        os.rmdir(path)
    _mount("tmpfs", "/", None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    os.chdir(BOX)
    return proc


def confine(seconds: float, megabytes: int) -> None:
    """Take all rights from this process, for good: limits, capabilities, calls, being traced."""
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: 2 * megabytes << 20,  # stacks are reserved and seldom used
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_FSIZE: FOLDER << 20,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_CORE: 1,  # one byte: at 0 a core would still go to a program of the host
        resource.RLIMIT_MEMLOCK: 0,
    }
    for limit, most in limits.items():
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    if sys.platform != "linux":
        return
    if hasattr(LIBC, "mallopt"):  # glibc
        LIBC.mallopt(ARENA_MAX, 1)  # else each thread reserves 64 MB of address space
    for capability in range(64):
        LIBC.prctl(CAPBSET_DROP, capability, 0, 0, 0)  # fails above the last one there is
    version_3, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check("capset", LIBC.capset(version_3, nothing))
    _check("no_new_privs", LIBC.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if MACHINE in AUDIT:
        code = filter_program(MACHINE)
        buffer = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
        _check("seccomp", LIBC.prctl(SET_SECCOMP, 2, program, 0, 0))
    LIBC.prctl(SET_DUMPABLE, 0)


def filter_program(machine: str) -> bytes:
    """Return a seccomp filter, in instructions of 8 bytes: it allows all but what is refused."""
    column = list(AUDIT).index(machine)
    numbers = [pair[column] for pair in REFUSED.values() if pair[column] >= 0]
    no = (RETURN, 0, 0, REFUSE | errno.EPERM)
    namespaces = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
    steps = [
        *[(LOAD, 0, 0, 4), (EQUAL, 1, 0, AUDIT[machine]), (RETURN, 0, 0, KILL)],
        (LOAD, 0, 0, 0),
        *[(AT_LEAST, 0, 1, 0x40000000), no],  # x86-64's second set of numbers
        *[step for number in numbers for step in ((EQUAL, 0, 1, number), no)],
        # its flags lie in memory; without it libraries fall back on clone
        *[(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, REFUSE | errno.ENOSYS)],
        # limits of a process of another number: those of the harness
        *[(EQUAL, 0, 4, PRLIMIT[machine]), (LOAD, 0, 0, 16), (EQUAL, 1, 0, 0), no],
        (RETURN, 0, 0, ALLOW),
        *[(EQUAL, 1, 0, CLONE[machine]), (RETURN, 0, 0, ALLOW)],
        *[(LOAD, 0, 0, 16), (ANY_BIT, 0, 1, namespaces), no, (RETURN, 0, 0, ALLOW)],
    ]
    return b"".join(struct.pack("HBBI", *step) for step in steps)
