"""Bundles, the check of room, choice of device and transport, and watching for the first death: all without Ray."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from pearl_ray.cluster.devices import DeviceKey, choose_device, choose_transport
from pearl_ray.cluster.placement import describe_shortage, plan_bundles, unplaceable
from pearl_ray.cluster.supervisor import Death, Supervisor
from pearl_ray.core.errors import ConfigError


def test_the_default_deployment_fits_a_machine_of_two_cores():
    bundles = plan_bundles("cpu", 1, 7)
    assert [(b.role, b.rank) for b in bundles[:3]] == [("coordinator", 0), ("draft", 0), ("target", 0)]
    assert len(bundles) == 9
    assert unplaceable(bundles, {"a": {"CPU": 2.0, "memory": 1e9}}) == []
    assert unplaceable(bundles, {"a": {"CPU": 0.9}}) == []


def test_gpu_shards_ask_for_a_gpu_each_and_the_coordinator_for_none():
    bundles = plan_bundles("cuda", 1, 7)
    assert "GPU" not in bundles[0].resources
    assert all(b.resources == {"GPU": 1.0, "CPU": 1.0} for b in bundles[1:])
    assert unplaceable(bundles, {"a": {"GPU": 8, "CPU": 16}}) == []
    missing = unplaceable(bundles, {"a": {"GPU": 6, "CPU": 16}})
    assert [(b.role, b.rank) for b in missing] == [("target", 5), ("target", 6)]


def test_draft_and_target_can_share_one_gpu():
    bundles = plan_bundles("cuda", 1, 1, gpu_fraction=0.5)
    assert unplaceable(bundles, {"a": {"GPU": 1, "CPU": 2}}) == []
    assert len(unplaceable(bundles, {"a": {"GPU": 0.5, "CPU": 2}})) == 1


def test_the_coordinator_does_not_take_the_cpu_that_a_gpu_shard_needs():
    bundles = plan_bundles("cuda", 0, 1)
    assert unplaceable(bundles, {"a": {"GPU": 1, "CPU": 1}, "b": {"CPU": 1}}) == []


def test_many_small_shares_do_not_fail_by_rounding():
    assert unplaceable(plan_bundles("cpu", 0, 9), {"a": {"CPU": 1.0}}) == []


def test_a_shortage_names_the_bundles_and_what_is_free():
    bundles = plan_bundles("cuda", 1, 1)
    nodes = {"0123456789ab": {"GPU": 1.0, "CPU": 4.0}}
    text = describe_shortage(bundles, unplaceable(bundles, nodes), nodes)
    assert "no room for target 0 (GPU 1 CPU 1) (of 3 bundles); free are node 01234567: GPU 1 CPU 4." in text
    assert "no node is alive" in describe_shortage(bundles, bundles, {})


def test_the_device_follows_the_cluster_unless_named():
    with_gpu, without = {"a": {"CPU": 1}, "b": {"GPU": 2}}, {"a": {"CPU": 1}}
    assert (choose_device("auto", with_gpu), choose_device("auto", without)) == ("cuda", "cpu")
    assert choose_device("cpu", with_gpu) == "cpu"
    with pytest.raises(ConfigError, match="the Ray cluster has no GPU"):
        choose_device("cuda", without)
    with pytest.raises(ConfigError, match="one of auto, cuda, cpu"):
        choose_device("tpu", without)


def test_a_transport_suits_every_rank():
    cpu, gpu0, gpu1 = DeviceKey("a", None), DeviceKey("a", "g0"), DeviceKey("b", "g1")
    assert choose_transport([gpu0]) == "single"
    assert choose_transport([gpu0, gpu1]) == "nccl"
    assert choose_transport([gpu0, gpu0]) == "shm"
    assert choose_transport([cpu, cpu]) == "shm"
    assert choose_transport([cpu, DeviceKey("b", None)]) == "gloo"
    assert choose_transport([gpu0, gpu0, gpu1]) == "gloo"


def test_the_first_death_is_reported_with_its_error_and_the_rest_stay_watched():
    async def scenario() -> list[Death]:
        loop = asyncio.get_running_loop()
        calls = {name: loop.create_future() for name in ("draft 0", "target 0", "target 1")}
        supervisor = Supervisor(calls)
        error = RuntimeError("the actor died")
        loop.call_later(0.01, calls["target 1"].set_exception, error)
        deaths = [await supervisor.wait_first_death()]
        assert supervisor.names == ("draft 0", "target 0")
        assert deaths[0].error is error
        supervisor.forget("draft 0")
        waiting = asyncio.ensure_future(supervisor.wait_first_death())
        await asyncio.sleep(0.01)
        late = loop.create_future()
        supervisor.watch("draft 1", late)
        calls["draft 0"].set_exception(RuntimeError("ended on purpose"))
        late.set_result(None)
        deaths.append(await asyncio.wait_for(waiting, 60))
        calls["target 0"].cancel()
        deaths.append(await asyncio.wait_for(supervisor.wait_first_death(), 60))
        supervisor.close()
        calls["draft 0"].exception()
        return deaths

    deaths = asyncio.run(scenario())
    assert [death.name for death in deaths] == ["target 1", "draft 1", "target 0"]
    assert deaths[1].error is None
    assert isinstance(deaths[2].error, asyncio.CancelledError)


def test_nothing_here_imports_ray_before_it_is_used():
    names = "bridge channels devices mailbox placement ray_session shm shm_group supervisor torch_group"
    code = (
        f"import sys\nfor n in {names!r}.split(): __import__('pearl_ray.cluster.' + n)\nassert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
