"""The bridge's transport: what a placement allows, the trial that measures, and the one that is taken."""

from __future__ import annotations

import asyncio
import dataclasses
import glob
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from pearl_ray.actors.bringup import BridgeChoice, BringUp
from pearl_ray.actors.spec import BridgeWiring, DeploymentSpec, Role, ShardInfo
from pearl_ray.cluster.bridge import Bridge
from pearl_ray.cluster.bridge_choice import (
    BridgeTrial,
    candidates,
    fastest,
    frame_sizes,
    measure_round_trip,
    obstacles,
    typical_verdict,
    typical_window,
)
from pearl_ray.cluster.devices import DeviceKey
from pearl_ray.cluster.mailbox import ShmMailbox
from pearl_ray.cluster.meeting import StoreServer, open_mailbox
from pearl_ray.cluster.shm import arena_path
from pearl_ray.config import PearlConfig, resolve
from pearl_ray.core.errors import ConfigError
from tests.together import together

PATIENCE_S = 60.0  # deadlines of what must come: loaded machines stall
IN_VAIN_S = 0.5  # of what never comes

ONE_CPU_HOST = [DeviceKey("a", None)] * 3
CPU_HOSTS = [DeviceKey("a", None), DeviceKey("b", None)]
GPUS = [DeviceKey("a", "GPU-0"), DeviceKey("a", "GPU-1")]
FAR_GPUS = [DeviceKey("a", "GPU-0"), DeviceKey("b", "GPU-1")]
SHARED_GPU = [DeviceKey("a", "GPU-0"), DeviceKey("a", "GPU-0")]


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory():
    before = set(glob.glob("/dev/shm/pearl-*"))
    yield
    assert [p for p in set(glob.glob("/dev/shm/pearl-*")) - before if f"-{os.getpid()}-" in p] == []


# -- what is possible ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "has_nccl", "expected"),
    [
        (ONE_CPU_HOST, True, ("shm",)),
        (CPU_HOSTS, True, ("gloo",)),
        (GPUS, True, ("shm", "gloo", "nccl")),
        (GPUS, False, ("shm", "gloo")),
        (FAR_GPUS, True, ("gloo", "nccl")),
        (SHARED_GPU, True, ("shm", "gloo")),
    ],
)
def test_auto_tries_what_the_placement_allows_and_takes_shared_memory_on_one_hosts_cpus(keys, has_nccl, expected):
    assert candidates("auto", keys, has_nccl=has_nccl) == expected


@pytest.mark.parametrize(
    ("requested", "keys", "has_nccl", "reason"),
    [
        ("nccl", ONE_CPU_HOST, True, "NCCL needs a GPU per shard; possible here: auto, shm, gloo"),
        ("nccl", SHARED_GPU, True, "NCCL refuses two ranks on one device"),
        ("nccl", GPUS, False, "built without NCCL"),
        ("shm", FAR_GPUS, True, "the shards are on several hosts; possible here: auto, gloo, nccl"),
        ("shm", CPU_HOSTS, True, "the shards are on several hosts; possible here: auto, gloo"),
    ],
)
def test_an_impossible_transport_is_refused_with_the_reason_and_what_is_possible(requested, keys, has_nccl, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        candidates(requested, keys, has_nccl=has_nccl)
    assert caught.value.field == "bridge"


@pytest.mark.parametrize(("requested", "keys"), [("gloo", ONE_CPU_HOST), ("shm", GPUS), ("nccl", FAR_GPUS)])
def test_a_possible_transport_that_is_asked_for_is_the_only_candidate(requested, keys):
    assert candidates(requested, keys, has_nccl=True) == (requested,)


def test_gloo_is_never_impossible():
    for keys in (ONE_CPU_HOST, CPU_HOSTS, GPUS, FAR_GPUS, SHARED_GPU):
        assert obstacles(keys, has_nccl=False)["gloo"] is None


def test_the_fastest_is_taken_and_of_two_equal_ones_shared_memory():
    assert fastest({"gloo": 3e-4, "nccl": 7e-5}) == "nccl"
    assert fastest({"shm": 1e-4, "gloo": 1e-4, "nccl": 2e-4}) == "shm"


def test_a_frame_holds_a_rounds_message_without_proposals_within_limits():
    for num_sequences, window in ((1, 1), (32, 8), (256, 8)):
        windows, verdicts = frame_sizes(num_sequences, window)
        assert len(typical_window(num_sequences, window, rejection=False).to_bytes()) + 16 <= windows <= 1 << 16
        assert len(typical_verdict(num_sequences).to_bytes()) + 16 <= verdicts <= 1 << 16
    assert frame_sizes(1024, 64)[0] == 1 << 16  # the rest travels in a piece


# -- the trial -----------------------------------------------------------------------------------------------------


def shards(num_draft: int, num_target: int) -> list[tuple[str, int]]:
    return [("draft", rank) for rank in range(num_draft)] + [("target", rank) for rank in range(num_target)]


def open_ends(transport: str, points: tuple[str, str], role: str, rank: int, tp: tuple[int, int]) -> Bridge:
    """One shard's ends, windows first; ``tp``: draft's and target's."""
    drafting = role == "draft"
    bridge = Bridge(None, None, PATIENCE_S)
    options = {"host": "127.0.0.1", "timeout_s": PATIENCE_S}
    if not drafting or rank == 0:
        bridge.windows = open_mailbox(transport, points[0], 0 if drafting else rank + 1, tp[1], **options)
    if drafting or rank == 0:
        bridge.verdicts = open_mailbox(transport, points[1], rank + 1 if drafting else 0, tp[0], **options)
    return bridge


@pytest.mark.parametrize("rejection", [False, True])
@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_trial_measures_at_the_drafts_leader_and_ends_at_every_shard(transport, rejection):
    server = StoreServer("127.0.0.1", PATIENCE_S)
    points = (
        (arena_path("test"), arena_path("test"))
        if transport == "shm"
        else (f"{server.address}/w", f"{server.address}/v")
    )
    tp = (2, 3)
    # as in the bring-up: nobody closes before all have opened
    all_done = threading.Barrier(sum(tp), timeout=PATIENCE_S)

    def shard(role: str, rank: int) -> float | None:
        bridge = open_ends(transport, points, role, rank, tp)
        try:
            seconds = measure_round_trip(
                bridge, role, rank, num_sequences=4, window=3, rejection=rejection, budget_s=0.0, timeout_s=PATIENCE_S
            )
            all_done.wait()
            return seconds
        finally:
            bridge.close()

    results = together(*(lambda who=who: shard(*who) for who in shards(*tp)))
    assert isinstance(results[0], float) and results[0] > 0, results
    assert results[1:] == [None] * 4


def test_what_is_taken_goes_on_and_the_others_are_closed():
    paths = [arena_path("test") for _ in range(4)]
    draft, target = BridgeTrial(None, None), BridgeTrial(None, None)
    for transport, (windows, verdicts) in {"shm": paths[:2], "gloo": paths[2:]}.items():  # both in memory, for the test
        draft.over[transport] = Bridge(ShmMailbox(windows, 0, 1), ShmMailbox(verdicts, 0, 1), 5.0)
        target.over[transport] = Bridge(ShmMailbox(windows, 1, 1), ShmMailbox(verdicts, 1, 1), 5.0)
    left = draft.over["gloo"]
    taken = draft.take("shm"), target.take("shm")
    taken[0].send_window(typical_window(2, 2, rejection=False, round=7))
    assert taken[1].receive_window(7).lengths_S.tolist() == [2, 2]
    assert (taken[0].traffic.num_sent, taken[0].timeout_s) == (1, 5.0)
    with pytest.raises(ConnectionError, match="closed"):
        left.send_window(typical_window(1, 1, rejection=False))
    for bridge in taken:
        bridge.close()


def test_an_aborted_trial_ends_at_all_transports():
    path = arena_path("test")
    trial = BridgeTrial(None, None, over={"shm": Bridge(None, ShmMailbox(path, 0, 1))})
    reader = ShmMailbox(path, 1, 1)
    trial.abort()
    with pytest.raises(ConnectionError, match="aborted"):
        reader.receive(5.0)
    trial.close()
    reader.close()


# -- the bring-up, with shards that are threads ------------------------------------------------------------------------


class FakeWorker:
    """What ``bridging`` touches of a shard."""

    def __init__(self, spec: DeploymentSpec, role: Role, rank: int) -> None:
        self.spec, self.role, self.rank = spec, role, rank
        self.bridge: Bridge | None = None


class FakeShard:
    """A shard's handle: its calls run in order in a thread.

    Over ``broken`` the draft's leader opens nothing; the others wait for it, in vain, for ``IN_VAIN_S``.
    """

    def __init__(self, worker: FakeWorker, broken: str | None) -> None:
        self.worker = worker
        self._broken = broken
        self._thread = ThreadPoolExecutor(1)
        self._store: StoreServer | None = None
        self.__ray_call__ = SimpleNamespace(remote=self._call)
        self.open_store = SimpleNamespace(remote=lambda: self._run(self._open_store))

    def _call(self, function: Callable[..., object], argument: object) -> Awaitable[object]:
        def run() -> object:
            worker, is_broken = self.worker, False
            if isinstance(argument, BridgeWiring):
                is_broken = argument.windows.transport == self._broken
                timeout_s = IN_VAIN_S if is_broken else PATIENCE_S
                worker.spec = dataclasses.replace(worker.spec, round_timeout_s=timeout_s)
            if is_broken and (worker.role, worker.rank) == ("draft", 0):
                raise ConnectionError("no route")
            return function(worker, argument)

        return self._run(run)

    def _run(self, job: Callable[[], object]) -> Awaitable[object]:
        return asyncio.get_running_loop().run_in_executor(self._thread, job)

    def _open_store(self) -> str:
        self._store = StoreServer("127.0.0.1", PATIENCE_S)
        return self._store.address


def deployment_spec(bridge: str) -> DeploymentSpec:
    plain = {field.name: None for field in dataclasses.fields(DeploymentSpec)}
    chosen = {"mode": "pearl", "verification": "coupled", "target_tp": 2, "draft_tp": 2, "max_num_seqs": 4}
    return DeploymentSpec(**plain | chosen | {"bridge": bridge, "round_timeout_s": PATIENCE_S})


def bring_up_bridge(
    bridge: str, key: DeviceKey, *, broken: str | None = None
) -> tuple[BridgeChoice | None, list[FakeShard]]:
    """The choice that a bring-up makes, all shards being at ``key``; the draft's leader is the broken one."""
    spec = deployment_spec(bridge)
    fakes = {who: FakeShard(FakeWorker(spec, *who), broken) for who in shards(2, 2)}
    bring_up = BringUp(spec, fakes)
    bring_up._infos = {
        who: ShardInfo(role=who[0], rank=who[1], key=key, ip="", pid=0, device="cpu", free_bytes=0) for who in fakes
    }
    try:
        return asyncio.run(bring_up._bridge()), list(fakes.values())
    finally:
        bring_up.discard()


def one_round(fakes: list[FakeShard]) -> None:
    """A window and its verdict over the bridges that the shards hold."""
    bridges = {(fake.worker.role, fake.worker.rank): fake.worker.bridge for fake in fakes}
    assert {type(bridge) for bridge in bridges.values()} == {Bridge}
    bridges["draft", 0].send_window(typical_window(4, 2, rejection=False, round=3))
    assert all(bridges["target", rank].receive_window(3).lengths_S.tolist() == [2] * 4 for rank in (0, 1))
    bridges["target", 0].send_verdict(typical_verdict(4, round=3))
    assert all(bridges["draft", rank].receive_verdict(3).tokens_S.tolist() == [0] * 4 for rank in (0, 1))
    assert all(bridge.traffic.num_sent + bridge.traffic.num_received <= 2 for bridge in bridges.values())
    together(*(bridge.close for bridge in bridges.values()))


@pytest.mark.parametrize("bridge", ["auto", "shm", "gloo"])
def test_on_cpus_the_shards_come_up_with_the_transport_that_was_asked_for_and_measure_nothing(bridge):
    choice, fakes = bring_up_bridge(bridge, DeviceKey("a", None))
    assert choice == BridgeChoice("shm" if bridge == "auto" else bridge, {})
    one_round(fakes)


def test_on_gpus_all_that_is_possible_is_measured_once_and_every_shard_keeps_the_fastest(caplog):
    caplog.set_level(logging.INFO)
    choice, fakes = bring_up_bridge("auto", DeviceKey("a", "GPU-0"))  # one for all: NCCL is out
    assert set(choice.round_trips_s) == {"shm", "gloo"} and all(s > 0 for s in choice.round_trips_s.values())
    assert choice.transport == fastest(choice.round_trips_s)
    assert f"the bridge goes over {choice.transport} (round trips: shm" in caplog.text
    one_round(fakes)


@pytest.mark.parametrize(("broken", "left"), [("gloo", "shm"), ("shm", "gloo")])
def test_a_transport_that_one_shard_cannot_open_is_left_out_with_a_warning(broken, left, caplog):
    choice, fakes = bring_up_bridge("auto", DeviceKey("a", "GPU-0"), broken=broken)
    assert choice.transport == left and set(choice.round_trips_s) == {left}
    assert f"the bridge can't go over {broken} here: no route" in caplog.text
    one_round(fakes)


def test_a_transport_that_was_asked_for_and_fails_is_an_error():
    with pytest.raises(ConnectionError, match="no route"):
        bring_up_bridge("gloo", DeviceKey("a", None), broken="gloo")


@pytest.mark.parametrize(
    ("settings", "has_cuda"), [({"device": "cpu"}, True), ({}, False), ({"colocate": True}, True)], ids=str
)
def test_nccl_without_a_gpu_for_each_shard_is_refused_before_anything_is_started(settings, has_cuda):
    config = PearlConfig(bridge="nccl", **settings)
    with pytest.raises(ConfigError, match=r"bridge='nccl' is not allowed: NCCL .*; possible here: auto, shm, gloo"):
        resolve(config, has_cuda=has_cuda)
    assert resolve(dataclasses.replace(config, mode="ar"), has_cuda=True).bridge == "nccl"
