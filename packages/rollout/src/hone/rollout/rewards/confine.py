"""Runs inside: shuts this process in, then becomes the program to run. A script of its own (`python -I -S confine.py SPEC STATUS`).

"namespaces" builds the cell itself: user, mount, pid, network, ipc and uts namespaces, a root of read-only mounts on a small
tmpfs, an unprivileged user. "inner" is run by bubblewrap, which has built it. Both end alike: resource limits, Landlock,
no_new_privs, a clean environment, exec. SPEC and STATUS are descriptors: what to do as JSON, and where to say what failed;
nothing said until it is closed by exec means that the program runs confined.

References: user_namespaces(7), pivot_root(2), mount_setattr(2), landlock(7).
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE, _DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _AT_FDCWD, _AT_RECURSIVE = 1, 2, 4, -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(platform.machine())
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_READ, _FILE_WRITE = 0b1101, 0b10 | 1 << 14  # execute, read files and directories; write and truncate files


def checked(result: int, what: str) -> int:
    """The result of a system call; OSError with what was tried."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def die_with_parent() -> None:
    """Linux kills this process when its parent ends, however that ends."""
    checked(LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl PDEATHSIG")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Attach a file system; OSError with the target."""
    name = None if kind is None else kind.encode()
    checked(LIBC.mount(source.encode(), target.encode(), name, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def bind(source: str, target: str, *, device: bool = False) -> None:
    """A part of the old root in the new one, read-only with everything mounted below it."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT, 0o444))
    mount(source, target, None, _BIND | _REC)
    if not device:
        attributes = struct.pack("QQQQ", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
        result = LIBC.syscall(_MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, len(attributes))
        checked(result, f"make {target} read-only")


def pivot(new: str, old: str) -> None:
    """pivot_root(2), which the C library does not wrap."""
    if _PIVOT_ROOT is None:
        raise OSError(f"no number for pivot_root on {platform.machine()}")
    checked(LIBC.syscall(_PIVOT_ROOT, new.encode(), old.encode()), "pivot_root")


def own_user_namespace(uid: int, gid: int) -> None:
    """A user namespace in which only `uid` and `gid` exist, as nobody."""
    checked(LIBC.unshare(_NEWUSER), "unshare user")
    for name, content in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)


def new_root(spec: dict[str, Any]) -> None:
    """A small tmpfs as root, the old one at /old, the readable parts bound below /new, the files in /new/box."""
    mount("none", "/", None, _REC | _PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
    os.mkdir("/tmp/new")
    os.mkdir("/tmp/old")
    pivot("/tmp", "/tmp/old")
    os.chdir("/")
    mount("tmpfs", "/new", "tmpfs", _NOSUID | _NODEV, f"mode=755,size={spec['disk_bytes']},nr_inodes=4096")
    for path in spec["readable"]:
        bind(f"/old{path}", f"/new{path}")
    for path, target in spec["links"].items():
        os.symlink(target, f"/new{path}")
    for name in ("null", "zero", "full", "random", "urandom"):
        bind(f"/old/dev/{name}", f"/new/dev/{name}", device=True)
    os.mkdir("/new/proc")
    for place in ("/new/box", "/new/tmp"):
        os.mkdir(place)
        os.chmod(place, 0o777)
    write_files(spec, "/new/box")


def write_files(spec: dict[str, Any], directory: str) -> None:
    """The program's files, readable by everybody."""
    for name, content in spec["files"].items():
        with open(os.path.join(directory, name), "w") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)


def landlock() -> None:
    """Reading everywhere (there is only what was bound), writing in /box, /tmp and /dev/null, no TCP, no signals outward."""
    version = checked(LIBC.syscall(_LANDLOCK_CREATE, None, 0, 1), "this kernel has no Landlock")
    rights = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    attributes = struct.pack("QQQ", rights, 3, 3)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = checked(LIBC.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0), "landlock_create_ruleset")
    for path, allowed in (("/", _READ), ("/box", rights), ("/tmp", rights), ("/dev/null", _FILE_WRITE & rights | 4)):
        place = os.open(path, os.O_PATH)
        checked(LIBC.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, place), 0), f"landlock_add_rule {path}")
        os.close(place)
    checked(LIBC.syscall(_LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
    os.close(rules)


def limit(spec: dict[str, Any]) -> None:
    """Resource limits, no new privileges, Landlock."""
    limits = {
        resource.RLIMIT_CPU: spec["cpu_s"],
        resource.RLIMIT_AS: spec["memory_bytes"],
        resource.RLIMIT_FSIZE: spec["disk_bytes"],
        resource.RLIMIT_NPROC: spec["processes"],
        resource.RLIMIT_NOFILE: spec["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))
    # Should the machine run out of memory, this goes first.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    checked(LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl NO_NEW_PRIVS")
    landlock()


def become(spec: dict[str, Any], status: int) -> None:
    """Run the program in this process."""
    os.chdir("/box")
    os.set_inheritable(status, False)
    keep = {0, 1, 2, status}
    for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
        if descriptor not in keep:
            try:
                os.close(descriptor)
            except OSError:
                continue  # the one that listed them
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/box", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    os.execve(spec["command"][0], spec["command"], environment)


def namespaces(spec: dict[str, Any], status: int) -> None:
    """Build the cell, start its first process, wait for it; does not return."""
    die_with_parent()
    as_root = os.geteuid() == 0
    if not as_root:
        own_user_namespace(os.geteuid(), os.getegid())
    checked(LIBC.unshare(_NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS), "unshare mount, pid, network, ipc and uts namespaces")
    new_root(spec)
    first = os.fork()
    if first == 0:
        try:
            first_process(spec, status, as_root=as_root)
        except BaseException as error:
            failed(status, error)
    os.close(status)
    os.closerange(0, 3)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0xFF)


def first_process(spec: dict[str, Any], status: int, *, as_root: bool) -> None:
    """Process 1 of the cell: with it, everything in it ends."""
    die_with_parent()
    mount("proc", "/new/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    os.chdir("/new")
    pivot(".", ".")
    checked(LIBC.umount2(b".", _DETACH), "detach the old root")
    os.chdir("/")
    if as_root:
        # Limits of processes do not bind root; so the user changes, and only then enters a namespace of its own.
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        checked(LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl DUMPABLE")
        die_with_parent()  # a change of user forgets it
        own_user_namespace(NOBODY, NOBODY)
    # No further user namespaces inside: they are the way to most of the kernel's attack surface.
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    os.setsid()
    main = os.fork()
    if main == 0:
        try:
            limit(spec)
            become(spec, status)
        except BaseException as error:
            failed(status, error)
    os.close(status)
    os.closerange(0, 3)
    while True:
        ended, how = os.wait()
        if ended == main:
            code = os.waitstatus_to_exitcode(how)
            os._exit(code if code >= 0 else 128 - code)


def failed(status: int, error: BaseException) -> None:
    """Say what failed and end."""
    os.write(status, f"{type(error).__name__}: {error}".encode()[:2000])
    os._exit(126)


def main() -> None:
    """Read what to do, and do it."""
    spec_descriptor, status = int(sys.argv[1]), int(sys.argv[2])
    with open(spec_descriptor) as file:
        spec = json.load(file)
    try:
        if spec["tier"] == "inner":
            write_files(spec, "/box")
            limit(spec)
            become(spec, status)
        namespaces(spec, status)
    except BaseException as error:
        failed(status, error)


if __name__ == "__main__":
    main()
