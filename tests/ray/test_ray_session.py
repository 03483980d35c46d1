"""Joining real Ray clusters with authentication on and off, and starting our own; each test leaves no process behind.

`ray stop` would end every Ray of the machine: a test ends exactly the session of processes that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"
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
        """`ray start --head` as a user would type it, on a free port; returns its address."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        log = (self.rays / "head.log").open("w")
        ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"]
        options = [f"--port={port}", "--num-cpus=1", "--object-store-memory=80000000", "--include-dashboard=false"]
        process = subprocess.Popen(
            [*ray, *options, "--disable-usage-stats"],
            env=self.environment(**extra),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()
        self.sessions.append(process.pid)
        deadline = time.monotonic() + 40
        while "Ray runtime started" not in (text := (self.rays / "head.log").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.1)
        return next(line for line in text.splitlines() if "--address=" in line).split("'")[1]

    def run(self, code: str, **extra: str) -> dict[str, object]:
        """Run ``code`` in a fresh interpreter; it leaves its findings in the dict ``out``."""
        program = f"import json, os\nout = {{}}\n{textwrap.dedent(code)}\nprint('OUT', json.dumps(out))"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("OUT ")]
        assert lines, done.stdout + done.stderr
        result = json.loads(lines[-1][4:])
        result["noise"] = done.stderr
        return result

    def end(self) -> None:
        """End all processes of the sessions started, and wait until they are gone."""
        for session in self.sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(session, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while (left := processes_of(session, self.rays)) and time.monotonic() < deadline:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(session, os.WNOHANG)
                time.sleep(0.05)
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(session, 0)


def processes_of(session: int, folder: Path) -> list[int]:
    """Processes (no zombies) of a session, or with ``folder`` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            state, _, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            if state != "Z" and (int(owner) == session or f"{folder}/" in command):
                found.append(int(entry.name))
    return found


@pytest.fixture
def machine() -> Iterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="pr", dir="/tmp"))  # short: Ray's sockets lie below it
    machine = Machine(folder)
    yield machine
    machine.end()
    left = processes_of(-1, machine.rays)
    shutil.rmtree(folder, ignore_errors=True)
    assert left == []


JOIN = """
    import time
    from pearl_ray.cluster.ray_session import open_session
    start = time.monotonic()
    session = open_session({address!r}, namespace="test")
    out["joined_s"] = time.monotonic() - start
    out["session"] = [session.address, session.started, session.auth_mode]
    import ray

    @ray.remote(num_cpus=0)
    def answer(asked):
        return ray.get(asked[0]) + 1  # the driver's own object: the worker must be let in there too

    out["answer"] = ray.get(answer.remote([ray.put(41)]), timeout=30)
    session.close()
    out["mode_after"] = os.environ.get("RAY_AUTH_MODE")
"""

PLACE = """
    from pearl_ray.cluster.ray_session import open_session
    session = open_session()
    from pearl_ray.cluster.placement import create_placement_group, nodes_of, plan_bundles, remove_placement_group
    from pearl_ray.core.errors import PlacementError
    bundles = plan_bundles("cpu", 1, 7)
    group = create_placement_group(bundles, "first")
    out["nodes"] = len(nodes_of(group))
    out["refused"] = []
    for name, more in (("second", bundles), ("gpu", plan_bundles("cuda", 1, 1))):
        try:
            create_placement_group(more, name, grace_s=0.5, timeout_s=5)
        except PlacementError as error:
            out["refused"].append(str(error))
    remove_placement_group(group)
    remove_placement_group(create_placement_group(bundles, "third"))
    session.close()
"""

REFUSED = """
    import time
    from pearl_ray.cluster.ray_session import open_session
    from pearl_ray.core.errors import PearlError
    start = time.monotonic()
    try:
        open_session({address!r})
    except PearlError as error:
        out["error"] = str(error)
    out["took_s"] = time.monotonic() - start
"""


def check_joined(result: dict[str, object], address: str, mode: str) -> None:
    assert result["session"] == [address, False, mode]
    assert result["answer"] == 42
    assert result["noise"] == ""


def test_a_cluster_without_authentication_is_joined_by_note_by_address_and_by_variable(machine):
    address = machine.start_head()
    check_joined(machine.run(JOIN.format(address=None)), address, "disabled")
    # a token that a local ray.init() left behind, and a mode set by hand, mislead Ray itself but not us
    machine.write_token()
    result = machine.run(JOIN.format(address=address), RAY_AUTH_MODE="token")
    assert "RAY_AUTH_MODE=token, but the cluster" in str(result.pop("noise"))
    check_joined(result | {"noise": ""}, address, "disabled")
    result = machine.run(JOIN.format(address=None), RAY_ADDRESS=address)
    check_joined(result, address, "disabled")
    assert result["mode_after"] is None


def test_a_cluster_whose_authentication_was_turned_on_by_a_token_file_is_joined(machine):
    machine.write_token()
    address = machine.start_head()
    check_joined(machine.run(JOIN.format(address=None)), address, "token")
    check_joined(machine.run(JOIN.format(address=address)), address, "token")


def test_a_placement_group_takes_all_bundles_or_is_refused_by_name_and_gives_them_back(machine):
    machine.start_head()
    result = machine.run(PLACE)
    assert result["nodes"] == 9
    second, gpu = result["refused"]
    assert "no room for" in second and "target 6 (CPU 0.1)" in second
    assert "no room for draft 0 (GPU 1 CPU 1), target 0" in gpu


def test_a_cluster_with_a_token_in_the_environment_is_joined_with_it_and_refused_in_one_line_without(machine):
    address = machine.start_head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    check_joined(machine.run(JOIN.format(address=address), RAY_AUTH_TOKEN=TOKEN), address, "token")
    result = machine.run(REFUSED.format(address=None))
    assert "demands a token and none was found: set RAY_AUTH_TOKEN" in str(result["error"])
    assert "\n" not in str(result["error"]) and result["noise"] == ""
    result = machine.run(REFUSED.format(address=address), RAY_AUTH_TOKEN=TOKEN[::-1])
    assert "refused the token found" in str(result["error"]) and float(str(result["took_s"])) < 15
    result = machine.run(REFUSED.format(address=address), RAY_AUTH_TOKEN_PATH=str(machine.home / "none"))
    assert "correct RAY_AUTH_TOKEN_PATH" in str(result["error"])


def test_an_own_ray_starts_without_authentication_whatever_lies_about_and_ends_with_the_session(machine):
    machine.write_token()
    result = machine.run(
        """
        from pearl_ray.cluster.ray_session import open_session
        session = open_session("local", namespace="test")
        import ray

        @ray.remote(num_cpus=0)
        def mode():
            return os.environ.get("RAY_AUTH_MODE")

        out["session"] = [session.started, session.auth_mode, ray.get(mode.remote(), timeout=30)]
        again = open_session()
        out["again"] = [again.started, again.address == session.address]
        again.close()
        out["still"] = ray.is_initialized()
        import subprocess, sys
        code = '''
        from pearl_ray.cluster.ray_session import open_session
        session = open_session("%s")
        print(session.auth_mode, session.started)
        ''' % session.address
        import textwrap
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
        out["client"] = done.stdout.split()
        session.close()
        session.close()
        out["after"] = [ray.is_initialized(), os.environ.get("RAY_AUTH_MODE")]
        """
    )
    assert result["session"] == [True, "disabled", "disabled"]
    assert result["again"] == [False, True] and result["still"] is True
    assert result["client"] == ["disabled", "False"]
    assert result["after"] == [False, None]
    assert result["noise"] == ""


def test_addresses_that_lead_nowhere_are_refused_in_one_line_at_once(machine):
    for address, words in (
        ("127.0.0.1:1", "no Ray listens there"),
        ("ray://host:10001", "Ray Client isn't supported"),
        ("somewhere", "host:port"),
    ):
        result = machine.run(REFUSED.format(address=address))
        assert words in str(result["error"]) and "\n" not in str(result["error"])
        assert float(str(result["took_s"])) < 10
