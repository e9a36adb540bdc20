"""The sandbox for code: what it locks, against programs that try to get out of it.

1. A program gets its files, its standard input, an interpreter and a scratch directory, and nothing else.
2. It reads no secret, opens no socket, sees and signals no process, gains no privilege.
3. Forking, memory, time, output and disk end at their limits; after it nothing of it is left.
4. A system without a sandbox is refused; a sandbox that cannot be set up is an error, never a failed test.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hone.rollout.errors import RewardError
from hone.rollout.rewards import sandbox
from hone.rollout.rewards.sandbox import Limits, Outcome
from tests.rollout.namespaces import kernel_has_namespaces

if not kernel_has_namespaces():
    pytest.skip("this kernel gives no namespaces or has no Landlock", allow_module_level=True)

SHORT = Limits(wall_s=20.0, cpu_s=10)
WHO_AM_I = f"hone-test-{secrets.token_hex(8)}"


def program(source: str, *, stdin: bytes = b"", limits: Limits = SHORT) -> Outcome:
    return sandbox.run([sandbox.interpreter(), "-I", "/box/main.py"], files={"main.py": source}, stdin=stdin, limits=limits)


def said(source: str, *, limits: Limits = SHORT) -> str:
    outcome = program(source, limits=limits)
    assert outcome.was_stopped == "", outcome
    return outcome.stdout.decode() + outcome.stderr.decode()


def survivors(marker: str) -> list[str]:
    """Processes of this machine with `marker` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            found += [line] if marker in line else []
    return found


def nothing_left(marker: str) -> None:
    end = time.monotonic() + 5
    while survivors(marker):
        assert time.monotonic() < end, survivors(marker)
        time.sleep(0.02)


def test_a_program_has_its_files_its_input_and_a_place_to_write() -> None:
    source = (
        "import os, sys, helper, math\nopen('note', 'w').write('kept')\nopen('/tmp/x', 'w').write('y')\n"
        "print(helper.x, sys.stdin.read(), open('note').read(), os.getcwd(), os.getuid(), sorted(os.environ))\nsys.exit(3)"
    )
    files = {"main.py": "import sys; sys.path.insert(0, '/box')\n" + source, "helper.py": "x = 7"}
    outcome = sandbox.run([sandbox.interpreter(), "-I", "/box/main.py"], files=files, stdin=b"in", limits=SHORT)
    assert outcome.stdout == b"7 in kept /box 65534 ['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED', 'TMPDIR']\n"
    assert (outcome.exit, outcome.stderr, outcome.was_stopped) == (3, b"", "")


def test_nothing_is_kept_between_runs() -> None:
    said("open('/tmp/left', 'w').write('x'); open('/box/left', 'w').write('x')")
    assert said("import os; print(os.listdir('/tmp'), os.listdir('/box'))") == "[] ['main.py']\n"


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "secret"
    path.write_text("sentinel")
    path.chmod(0o644)
    yield path
    assert path.read_text() == "sentinel"


def test_files_of_the_machine_are_not_there(secret: Path) -> None:
    places = [
        "/etc/passwd",
        "/etc/shadow",
        str(Path.home() / ".netrc"),
        "/proc/1/root/etc/passwd",
        "/home",
        "/var",
        "/sys/kernel",
        str(secret),
        __file__,
    ]
    source = (
        f"import os\nfor place in {places!r}:\n    try:\n        os.listdir(place) if os.path.isdir(place) else open(place)\n"
        "        print('READ', place)\n    except OSError as error:\n        pass\n"
        "print('tried')"
    )
    assert said(source) == "tried\n"
    assert "sentinel" not in said("import os\nfor at, _, names in os.walk('/proc'):\n    pass\nprint(open('/proc/1/environ', 'rb').read())")


def test_what_it_may_read_it_cannot_write() -> None:
    places = ["/usr/x", "/x", "/dev/x", "/etc/x", "/proc/sys/kernel/hostname", f"{sys.base_prefix}/x", sandbox.interpreter()]
    source = (
        f"for place in {places!r}:\n    try:\n        open(place, 'a').write('x')\n        print('WROTE', place)\n"
        "    except OSError:\n        pass\nprint('tried')"
    )
    assert said(source) == "tried\n"


def test_there_is_no_network(tmp_path: Path) -> None:
    """Neither the machine's loopback (a listening server), nor the net, nor a socket file, nor an abstract one."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as file, socket.socket(socket.AF_UNIX) as abstract:
        path, name = str(tmp_path / "s"), f"\0{WHO_AM_I}"
        file.bind(path)
        file.listen()
        abstract.bind(name)
        abstract.listen()
        port = server.getsockname()[1]
        source = (
            "import socket\n"
            f"for kind, to in [(2, ('127.0.0.1', {port})), (10, ('::1', {port})), (2, ('8.8.8.8', 53)), (1, {path!r}), (1, {name!r})]:\n"
            "    for form in (1, 2):\n        try:\n            s = socket.socket(kind, form); s.settimeout(2); s.connect(to)\n"
            "            s.send(b'x'); print('SENT', to)\n        except OSError: pass\nprint('tried')"
        )
        assert said(source) == "tried\n"
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_there_are_no_other_processes() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        source = (
            f"import os, signal\nfor pid in (-1, {bystander.pid}, {os.getpid()}, os.getppid(), 1):\n"
            "    try: os.kill(pid, signal.SIGKILL)\n    except OSError as error: print(type(error).__name__)\n"
            "print([name for name in os.listdir('/proc') if name.isdigit()])"
        )
        found = said(source)
        assert str(bystander.pid) not in found
        assert "ProcessLookupError" in found
        assert bystander.poll() is None
        bystander.kill()


def test_no_privilege_is_gained() -> None:
    calls = [
        ("unshare(0x10000000)", "unshare", "0x10000000"),
        ("mount", "mount", "b'none', b'/tmp', b'tmpfs', 0, None"),
        ("ptrace", "ptrace", "16, 1, 0, 0"),
        ("setuid", "setuid", "0"),
        ("chroot", "chroot", "b'/tmp'"),
        ("bpf", "syscall", "321, 0, 0, 0"),
    ]
    lines = "\n".join(f"print({name!r}, libc.{function}({arguments}))" for name, function, arguments in calls)
    found = said(f"import ctypes\nlibc = ctypes.CDLL(None)\n{lines}\nprint(open('/proc/self/status').read())")
    for name, _, _ in calls:
        assert f"{name} -1" in found
    status = dict(line.split(":\t", 1) for line in found.splitlines() if ":\t" in line)
    assert [status[name] for name in ("CapPrm", "CapEff", "CapAmb", "NoNewPrivs")] == ["0" * 16] * 3 + ["1"]


def test_a_fork_bomb_ends_at_its_limit() -> None:
    source = (
        f"import os, time\nmark = '{WHO_AM_I}-fork'\ncount = 0\nwhile True:\n    try:\n        if os.fork() == 0:\n"
        "            os.execv('/bin/sleep', ['sleep', '1000.7'])\n        count += 1\n    except OSError as error:\n"
        "        print(count, type(error).__name__)\n        break\n"
    )
    outcome = program(source)
    count, kind = outcome.stdout.decode().split()
    assert 1 <= int(count) < SHORT.processes
    assert kind == "BlockingIOError"
    nothing_left("sleep 1000.7")
    assert (
        program("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", limits=Limits(wall_s=1.5)).was_stopped == "time"
    )
    nothing_left("/box/main.py")


def test_time_memory_output_and_disk_end_at_their_limits() -> None:
    assert program("while True: pass", limits=Limits(wall_s=20.0, cpu_s=1)).exit in (128 + 9, 128 + 24)
    started = time.monotonic()
    slept = program("import time; time.sleep(1000)", limits=Limits(wall_s=1.0))
    assert (slept.was_stopped, time.monotonic() - started < 5) == ("time", True)
    assert "MemoryError" in said("x = bytearray(2 * 2**30)")
    flood = program("while True: print('x' * 1000)")
    assert flood.was_stopped == "output"
    assert len(flood.stdout) <= SHORT.output_bytes
    fill = (
        "import errno\ntry:\n    for n in range(1000):\n        with open(f'/box/{n}', 'wb') as file: file.write(bytes(8 * 2**20))\n"
        "except OSError as error: print(errno.errorcode[error.errno])\n"
    )
    assert said(fill) == "ENOSPC\n"
    large = "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    assert "OSError" in said(f"{large}with open('/box/x', 'wb') as file: file.seek(2**40); file.write(b'x')")
    many = "try:\n    for n in range(100_000): open(f'/box/{n}', 'w').close()\nexcept OSError as error: print(error.errno)"
    assert said(many) == "28\n"


def test_what_it_leaves_behind_dies_with_it() -> None:
    source = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.execv('/bin/sleep', ['sleep', '2000.3'])\n    os._exit(0)\nos.wait(); time.sleep(0.2); print('done')"
    )
    assert said(source) == "done\n"
    nothing_left("sleep 2000.3")


def test_a_reader_that_is_killed_takes_the_cell_along() -> None:
    source = "import os\nos.execv('/bin/sleep', ['sleep', '3000.9'])"
    code = (
        "from hone.rollout.rewards import sandbox\n"
        f"sandbox.run([sandbox.interpreter(), '-I', '/box/main.py'], files={{'main.py': {source!r}}}, limits=sandbox.Limits(wall_s=100))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as reader:
        end = time.monotonic() + 60
        while not survivors("sleep 3000.9"):
            assert time.monotonic() < end
            time.sleep(0.05)
        reader.kill()
    nothing_left("sleep 3000.9")


def test_cells_do_not_share_their_limits() -> None:
    """Eight at a time, each with as many processes as it may have."""
    source = "import os, time\nfor _ in range(10):\n    if os.fork() == 0:\n        time.sleep(1); os._exit(0)\nprint('ten')"
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(said(source))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["ten\n"] * 8


def test_a_sandbox_that_cannot_be_set_up_is_an_error_and_not_a_failed_program(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardError, match="could not be set up: FileNotFoundError"):
        sandbox.run(["/nowhere/python"], files={}, limits=SHORT)
    with pytest.raises(ValueError, match="plain names"):
        sandbox.run([sandbox.interpreter()], files={"../x": ""}, limits=SHORT)
    # A kernel without Landlock: the number of its first system call is one that no kernel has.
    monkeypatch.setattr(sandbox, "_source", lambda: Path(sandbox.confine.__file__).read_text().replace("442, 444,", "442, 9999,"))
    sandbox.available.cache_clear()
    with pytest.raises(RewardError, match=r"none is run without: .*has no Landlock.*install bubblewrap"):
        sandbox.available()
    monkeypatch.undo()
    sandbox.available.cache_clear()


def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.available.cache_clear()
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(RewardError, match="this is darwin; judge it elsewhere"):
        sandbox.available()
    monkeypatch.undo()
    sandbox.available.cache_clear()


OTHER_PYTHON = Path("/usr/bin/python3")
AS_NOBODY = """
import sys
sys.path.insert(0, {path!r})
from hone.rollout.rewards import sandbox
print(sandbox.available())
source = "import os, socket\\nprint(os.getuid(), os.path.exists('/etc/passwd'), os.path.exists('/var'))\\n"
source += "print(open('/proc/self/status').read())\\nn = 0\\ntry:\\n    while True:\\n"
source += "        if os.fork() == 0: os.execv('/bin/sleep', ['sleep', '4000.1'])\\n        n += 1\\n"
source += "except OSError: print('forks', n)\\n"
source += "try: socket.create_connection(('127.0.0.1', {port}), 2); print('CONNECTED')\\nexcept OSError: print('refused')\\n"
source += "try: open('/usr/x', 'w'); print('WROTE')\\nexcept OSError: print('read-only')\\n"
outcome = sandbox.run([sandbox.interpreter(), "-I", "/box/main.py"], files={{"main.py": source}})
print(outcome.stdout.decode(), outcome.stderr.decode(), outcome.was_stopped)
"""


@pytest.mark.skipif(os.geteuid() != 0 or not OTHER_PYTHON.exists(), reason="needs root (to be somebody else) and a Python anybody can read")
@pytest.mark.parametrize("tier", ["namespaces", "bubblewrap"])
def test_an_ordinary_user_is_confined_alike(tier: str) -> None:
    if tier == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    place = Path(f"/tmp/{WHO_AM_I}-{tier}")
    package = place / "hone" / "rollout" / "rewards"
    package.mkdir(parents=True)
    try:
        ours = Path(sandbox.__file__).parent
        for name in ("sandbox.py", "confine.py"):
            shutil.copy(ours / name, package / name)
        shutil.copy(ours.parent / "errors.py", package.parent / "errors.py")
        for path in (place, *place.rglob("*")):
            path.chmod(0o755)
        path = os.environ["PATH"] if tier == "bubblewrap" else "/nowhere"
        with socket.create_server(("127.0.0.1", 0)) as server:
            code = AS_NOBODY.format(path=str(place), port=server.getsockname()[1])
            found = subprocess.run(
                [str(OTHER_PYTHON), "-c", code],
                user=54321,
                group=54321,
                extra_groups=[],
                env={"PATH": path},
                cwd="/",
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
    finally:
        shutil.rmtree(place)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"{tier}\n65534 False False\n"), found.stdout
    assert "CapEff:\t0000000000000000" in found.stdout and "NoNewPrivs:\t1" in found.stdout
    assert "refused" in found.stdout and "read-only" in found.stdout
    assert 1 <= int(found.stdout.split("forks ")[1].split()[0]) < 16
    nothing_left("sleep 4000.1")
