"""Joining real Ray clusters with authentication on and off, and starting our own; each test leaves no process behind.

`ray stop` would end every Ray of the machine: a test ends exactly the session of processes that it started.
"""

from __future__ import annotations

import pytest

from pearl_ray.cluster import ray_session
from tests.ray.machine import TOKEN

pytestmark = pytest.mark.timeout(900)

JOIN = """
    from pearl_ray.cluster.ray_session import open_session
    session = open_session({address!r}, namespace="test")
    out["session"] = [session.address, session.started, session.auth_mode]
    import ray

    @ray.remote(num_cpus=0)
    def answer(asked):
        return ray.get(asked[0]) + 1  # the driver's own object: the worker must be let in there too

    out["answer"] = ray.get(answer.remote([ray.put(41)]), timeout=100)
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
    remove_placement_group(create_placement_group(bundles, "third", grace_s=60))  # Ray hears of it late
    session.close()
"""

# The best of three times, where the first isn't short: a machine that stalls isn't the product's.
REFUSED = """
    import time
    import ray
    from pearl_ray.cluster.ray_session import open_session
    from pearl_ray.core.errors import PearlError
    times = []
    while not times or (min(times) > {limit_s} and len(times) < 3):
        start = time.monotonic()
        try:
            open_session({address!r})
        except PearlError as error:
            out["error"] = str(error)
        times.append(time.monotonic() - start)
    out["took_s"] = min(times)
"""


def refused(address: str | None, limit_s: float = 15.0) -> str:
    return REFUSED.format(address=address, limit_s=limit_s)


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
    result = machine.run(refused(None))
    assert "demands a token and none was found: set RAY_AUTH_TOKEN" in str(result["error"])
    assert "\n" not in str(result["error"]) and result["noise"] == ""
    result = machine.run(refused(address), RAY_AUTH_TOKEN=TOKEN[::-1])
    assert "refused the token found" in str(result["error"]) and float(str(result["took_s"])) < 15
    result = machine.run(refused(address), RAY_AUTH_TOKEN_PATH=str(machine.home / "none"))
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

        out["session"] = [session.started, session.auth_mode, ray.get(mode.remote(), timeout=100)]
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
        result = machine.run(refused(address, 10.0))
        assert words in str(result["error"]) and "\n" not in str(result["error"])
        assert float(str(result["took_s"])) < 10


def test_a_client_tries_the_rays_of_a_machine_until_it_finds_the_one_it_wants(monkeypatch):
    left = []

    class Joined:
        def __init__(self, address: str) -> None:
            self.address = address

        def close(self) -> None:
            left.append(self.address)

    current = []

    def join(address: str, namespace: str | None, timeout_s: float) -> Joined:
        if address == "secret:1":
            raise ray_session.ClusterConnectionError("demands a token")
        current[:] = [address]
        return Joined(address)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_session, "_found_on_this_machine", lambda any_ray: ["secret:1", "other:2", "wanted:3"])
    monkeypatch.setattr(ray_session, "_join", join)
    session = ray_session.open_session(start=False, wanted=lambda: current == ["wanted:3"])
    assert session.address == "wanted:3" and left == ["other:2"]
    with pytest.raises(ray_session.ClusterConnectionError, match="demands a token"):
        ray_session.open_session(start=False, wanted=lambda: False)
    with pytest.raises(ray_session.ClusterConnectionError, match="demands a token"):
        ray_session.open_session(start=False)
