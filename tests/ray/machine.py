"""A machine of one's own for tests: a home, a Ray started as a user would, commands run in it, and nothing left behind.

`ray stop` would end every Ray of the machine: a test ends exactly the session of processes that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.together import holds_within

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"
PATIENCE_S = 60.0  # for what has to happen, but by itself: loaded machines stall
OF_RAY = ("etrics agent", "etrics exporter agent")  # in what Ray itself says on stderr when its agent is slow to start
STARTED = "This command will now block forever"  # `ray start`'s last words: the address is noted by then
CLEARED = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_TMPDIR")


class Machine:
    """A home, a temp folder for Ray, and the processes started with them."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.rays = folder / "r"
        self.home.mkdir()
        self.rays.mkdir()
        self.sessions: list[int] = []

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
        path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
        own = {"HOME": str(self.home), "RAY_TMPDIR": str(self.rays), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return kept | own | extra

    def write_token(self, token: str = TOKEN) -> None:
        (self.home / ".ray").mkdir(exist_ok=True)
        (self.home / ".ray" / "auth_token").write_text(token)

    def start_head(self, **extra: str) -> str:
        """`ray start --head` as a user would type it, on a port that the kernel chooses; returns its address."""
        log = (self.rays / "head.log").open("w")
        ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"]
        options = ["--port=0", "--num-cpus=1", "--object-store-memory=80000000", "--include-dashboard=false"]
        process = subprocess.Popen(
            [*ray, *options, "--disable-usage-stats"],
            env=self.environment(**{"RAY_gcs_server_port_wait_time_s": "120"} | extra),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()
        self.sessions.append(process.pid)
        deadline = time.monotonic() + 2 * PATIENCE_S
        while STARTED not in (text := (self.rays / "head.log").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.1)
        return next(line for line in text.splitlines() if "--address=" in line).split("'")[1]

    def run(self, code: str, **extra: str) -> dict[str, object]:
        """Run ``code`` in a fresh interpreter; it leaves its findings in the dict ``out``; ``noise`` is its stderr."""
        program = f"import json, os\nout = {{}}\n{textwrap.dedent(code)}\nprint('OUT', json.dumps(out))"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE_S,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("OUT ")]
        assert lines, done.stdout + done.stderr
        result = json.loads(lines[-1][4:])
        noise = done.stderr.splitlines(keepends=True)
        result["noise"] = "".join(line for line in noise if not any(words in line for words in OF_RAY))
        return result

    def end(self) -> None:
        """End all processes of the sessions started, and wait until they are gone.

        Killing is repeated: what a raylet forked while it was being ended joins the list late, and on a loaded
        machine a killed process stands in ``/proc`` for a while.
        """
        for session in self.sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(session, signal.SIGTERM)
            self._wait(session, seconds=10)
            deadline = time.monotonic() + PATIENCE_S
            while (left := processes_of(session, self.rays)) and time.monotonic() < deadline:
                for process in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                self._wait(session, seconds=2)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(session, 0)

    def _wait(self, session: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while processes_of(session, self.rays) and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(session, os.WNOHANG)
            time.sleep(0.05)


def wait_for(holds: Callable[[], bool]) -> bool:
    """Whether it holds, now or within ``PATIENCE_S``."""
    return holds_within(holds, PATIENCE_S)


def shared_memory() -> set[str]:
    """The names of our files in shared memory, other test runs' too: theirs come and go."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("pearl-")}


def processes_of(session: int, folder: Path) -> list[int]:
    """Processes (no zombies) of a session, or with ``folder`` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            state, _, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            command = command_line(int(entry.name))
            if state != "Z" and (int(owner) == session or f"{folder}/" in command):
                found.append(int(entry.name))
    return found


def command_line(process: int) -> str:
    """Its arguments, NUL-separated; empty when it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@pytest.fixture
def machine() -> Iterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="pr", dir="/tmp"))  # short: Ray's sockets lie below it
    machine = Machine(folder)
    yield machine
    machine.end()
    wait_for(lambda: not processes_of(-1, machine.rays))  # a Ray that a command started for itself ends by itself
    left = {process: command_line(process) for process in processes_of(-1, machine.rays)}
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    assert left == {}
