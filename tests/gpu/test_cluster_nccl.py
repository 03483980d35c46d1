"""The mailbox over NCCL between two GPUs: order, deadlines, abort, a killed peer, and other collectives beside it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch

from pearl_ray import PearlConfig, PearlEngine, SamplingParams
from pearl_ray.cluster.bridge import Bridge
from pearl_ray.cluster.bridge_choice import measure_round_trip
from pearl_ray.cluster.meeting import open_mailbox
from pearl_ray.cluster.nccl_mailbox import NcclMailbox
from pearl_ray.cluster.torch_group import TorchGroup, join_store, serve_store
from tests.tiny import tiny_pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 or not torch.distributed.is_nccl_available(), reason="needs two CUDA devices"
    ),
]

processes = multiprocessing.get_context("spawn")
FRAME, PIECE = 4096, 1 << 16
Job = Callable[[NcclMailbox, int], object]


def _party(result: Connection, job: Job, port: int, rank: int, timeout_s: float) -> None:
    torch.cuda.set_device(rank)
    group = TorchGroup("nccl", join_store("127.0.0.1", port), rank, 2, timeout_s, name="mailbox")
    mailbox = NcclMailbox(group, torch.device("cuda", rank), frame_bytes=FRAME, piece_bytes=PIECE)
    result.send(job(mailbox, port))
    mailbox.close()


def run_pair(write: Job, read: Job, *, timeout_s: float = 30.0, killed: int | None = None) -> list[object]:
    """What each party's job returns; ``killed`` kills itself in its job."""
    store, port = serve_store("127.0.0.1")
    parties = []
    for rank, job in enumerate((write, read)):
        receive, send = processes.Pipe(duplex=False)
        process = processes.Process(target=_party, args=(send, job, port, rank, timeout_s))
        process.start()
        send.close()
        parties.append((process, receive))
    results: list[object] = []
    try:
        for rank, (_, receive) in enumerate(parties):
            if rank == killed:
                results.append(None)
                continue
            assert receive.poll(120), f"party {rank} hangs"
            results.append(receive.recv())
    finally:
        for process, _ in parties:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
    del store
    return results


def messages() -> list[bytes]:
    sizes = (0, 1, FRAME - 17, FRAME - 16, FRAME - 15, 3 * PIECE, FRAME - 16 + PIECE, 100)
    return [bytes([i % 251]) * size for i, size in enumerate(sizes * 5)]


def _write_all(mailbox: NcclMailbox, _: int) -> None:
    for number, message in enumerate(messages()):
        time.sleep(0.01 * (number % 3))
        mailbox.send(message, 10.0)


def _read_all(mailbox: NcclMailbox, _: int) -> bool:
    received = []
    while len(received) < len(messages()):
        try:
            received.append(mailbox.receive(0.004 if len(received) % 2 else 10.0))
        except TimeoutError:
            continue  # a deadline loses nothing
    return received == messages()


def test_messages_of_every_size_arrive_in_order_whatever_the_deadlines():
    assert run_pair(_write_all, _read_all) == [None, True]


def _idle(mailbox: NcclMailbox, _: int) -> None:
    time.sleep(6)


def _abort_while_receiving(mailbox: NcclMailbox, _: int) -> bool:
    with pytest.raises(TimeoutError):
        mailbox.receive(0.5)
    threading.Timer(0.5, mailbox.abort).start()
    start = time.monotonic()
    with pytest.raises(ConnectionError):
        mailbox.receive(20.0)
    assert time.monotonic() - start < 5
    with pytest.raises(ConnectionError):
        mailbox.receive(1.0)
    x = torch.ones(1000, device="cuda")
    torch.cuda.synchronize()  # the waiting kernel has left the device
    return float(x.sum()) == 1000.0


def test_an_abort_from_another_thread_ends_a_receive_that_waits_on_the_device():
    assert run_pair(_idle, _abort_while_receiving)[1] is True


def _die(mailbox: NcclMailbox, _: int) -> None:
    mailbox.send(b"last words", 10.0)
    time.sleep(1)
    os.kill(os.getpid(), 9)


def _outlive(mailbox: NcclMailbox, _: int) -> bool:
    assert mailbox.receive(10.0) == b"last words"
    start = time.monotonic()
    with pytest.raises((TimeoutError, ConnectionError)):
        mailbox.receive(3.0)
    assert time.monotonic() - start < 5
    mailbox.abort()
    x = torch.ones(1000, device="cuda")
    torch.cuda.synchronize()
    return float(x.sum()) == 1000.0


def test_a_killed_writer_is_an_error_within_the_deadline_and_the_device_lives_on():
    assert run_pair(_die, _outlive, killed=0)[1] is True


ROUNDS = 200


def _beside(mailbox: NcclMailbox, port: int, rank: int) -> float:
    """A forward with all-reduces, queued and not waited for, then a message: as in a round, 200 times."""
    store = join_store("127.0.0.1", port)
    group = TorchGroup("nccl", store, rank, 2, 30.0, name="tensor-parallel")
    x = torch.ones(2048, 2048, device="cuda")
    for number in range(ROUNDS):
        for _ in range(4):
            y = (x @ x) / 4096
            group.all_reduce_(y)
        if rank == 0:
            mailbox.send(number.to_bytes(8, "little"), 20.0)
        else:
            assert int.from_bytes(mailbox.receive(20.0), "little") == number
    group.synchronize()
    result = float(y[0, 0])
    group.close()
    return result


def _write_beside(mailbox: NcclMailbox, port: int) -> float:
    return _beside(mailbox, port, 0)


def _read_beside(mailbox: NcclMailbox, port: int) -> float:
    return _beside(mailbox, port, 1)


def test_messages_between_the_all_reduces_of_another_group_neither_hang_nor_mix():
    assert run_pair(_write_beside, _read_beside) == [1.0, 1.0]


def _trial(result: Connection, port: int, rank: int) -> None:
    torch.cuda.set_device(rank)
    options = {"host": None, "timeout_s": 30.0, "frame_bytes": 1 << 15}
    windows = open_mailbox("nccl", f"127.0.0.1:{port}/windows", rank, 1, **options)
    verdicts = open_mailbox("nccl", f"127.0.0.1:{port}/verdicts", 1 - rank, 1, **options)
    bridge = Bridge(windows, verdicts, 30.0)
    role = "draft" if rank == 0 else "target"
    trips = [
        measure_round_trip(bridge, role, 0, num_sequences=256, window=8, rejection=rejection)
        for rejection in (False, True)
    ]
    bridge.close()
    result.send(trips)


def test_a_trial_over_nccl_measures_both_rules_messages():
    store, port = serve_store("127.0.0.1")
    parties = []
    for rank in range(2):
        receive, send = processes.Pipe(duplex=False)
        process = processes.Process(target=_trial, args=(send, port, rank))
        process.start()
        parties.append((process, receive))
    assert all(receive.poll(120) for _, receive in parties)
    trips, none = (receive.recv() for _, receive in parties)
    for process, _ in parties:
        process.join(20)
    assert none == [None, None] and all(0 < seconds < 1 for seconds in trips)
    print(f"window of 256 x 8 and back: {1e6 * trips[0]:.0f} µs; with proposals {1e6 * trips[1]:.0f} µs")
    del store


@pytest.mark.parametrize("bridge", ["auto", "nccl", "gloo", "shm"])
def test_an_engine_on_two_gpus_writes_the_same_text_over_every_transport(tmp_path_factory, bridge):
    sizes = {"hidden_size": 576, "head_dim": 64, "intermediate_size": 768}
    target, draft = tiny_pair(tmp_path_factory.mktemp("gpu"), **sizes)
    config = PearlConfig(
        target_model=str(target),
        draft_model=str(draft),
        device="cuda",
        dtype="float32",
        num_speculative_tokens=4,
        max_model_len=512,
        kv_cache_blocks=256,
        ray_address="local",
        bridge=bridge,
    )
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=40)
    with PearlEngine(config) as engine:
        pearl = engine.generate(["Once upon a time", "The 3 foxes ran."], params)
        alone = SamplingParams(temperature=0.8, seed=3, max_tokens=40, num_speculative_tokens=0)
        ar = engine.generate(["Once upon a time", "The 3 foxes ran."], alone)
    assert sum(o.metrics.num_accepted for o in pearl) > 0
    assert [o.outputs[0].token_ids for o in pearl] == [o.outputs[0].token_ids for o in ar]
