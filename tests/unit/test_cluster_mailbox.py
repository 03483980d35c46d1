"""Mailboxes and the bridge over them, between real processes."""

from __future__ import annotations

import glob
import multiprocessing
import os
import random
import threading
import time

import numpy as np
import pytest

from pearl_ray.cluster.bridge import Bridge
from pearl_ray.cluster.framed_mailbox import TorchMailbox
from pearl_ray.cluster.mailbox import Mailbox, ShmMailbox
from pearl_ray.cluster.shm import arena_path
from pearl_ray.cluster.torch_group import TorchGroup, join_store, serve_store
from pearl_ray.core.errors import ReplicaDivergedError
from pearl_ray.core.messages import VerdictMessage, Window

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "torch", "pearl_ray.cluster.mailbox", "pearl_ray.core.messages"])

PATIENCE_S = 60.0  # for what must come, processes that load torch first among it: loaded machines stall


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory():
    before = set(glob.glob("/dev/shm/pearl-*"))
    yield
    assert [p for p in set(glob.glob("/dev/shm/pearl-*")) - before if f"-{os.getpid()}-" in p] == []


def _open(kind: str, where: str | int, party: int, num_readers: int) -> Mailbox:
    if kind == "shm":
        return ShmMailbox(str(where), party, num_readers, slot_bytes=256, num_slots=4, timeout_s=PATIENCE_S)
    store = join_store("127.0.0.1", int(where))
    group = TorchGroup("gloo", store, party, num_readers + 1, PATIENCE_S, name="mailbox", host="127.0.0.1")
    return TorchMailbox(group, frame_bytes=256, piece_bytes=512)


def _messages(count: int) -> list[bytes]:
    """Empty ones, short ones, and ones of several slots."""
    chance = random.Random(3)
    return [chance.randbytes(chance.choice((0, 1, 17, 248, 249, 256, 257, 2000))) for _ in range(count)]


def _read_all(kind: str, where: str | int, reader: int, num_readers: int, count: int, result) -> None:
    mailbox = _open(kind, where, reader, num_readers)
    chance = random.Random(reader)
    received = []
    while len(received) < count:
        time.sleep(chance.choice((0, 0, 0, 1e-4, 3e-3)))
        try:
            received.append(mailbox.receive(chance.choice((1e-4, PATIENCE_S))))
        except TimeoutError:
            continue  # a deadline loses nothing
    result.send(received == _messages(count))
    mailbox.close()


@pytest.mark.parametrize(("kind", "num_readers"), [("shm", 1), ("shm", 3), ("gloo", 2)])
def test_messages_arrive_in_order_at_every_reader_whatever_the_delays(kind, num_readers):
    store, where = serve_store("127.0.0.1") if kind == "gloo" else (None, arena_path("test"))
    count = 150
    readers = []
    for reader in range(1, num_readers + 1):
        receive, send = processes.Pipe(duplex=False)
        readers.append(
            (processes.Process(target=_read_all, args=(kind, where, reader, num_readers, count, send)), receive)
        )
        readers[-1][0].start()
    writer = _open(kind, where, 0, num_readers)
    chance = random.Random(0)
    for message in _messages(count):
        time.sleep(chance.choice((0, 0, 0, 2e-3)))
        writer.send(message, 2 * PATIENCE_S)
    for process, receive in readers:
        assert receive.poll(2 * PATIENCE_S)
        assert receive.recv() is True
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    writer.close()
    del store


def _pair(**options) -> tuple[ShmMailbox, ShmMailbox]:
    path = arena_path("test")
    return ShmMailbox(path, 0, 1, **options), ShmMailbox(path, 1, 1, **options)


def test_a_reader_that_lags_is_named_at_the_writers_deadline():
    writer, reader = _pair(num_slots=2)
    writer.send(b"one", 1.0)
    writer.send(b"two", 1.0)
    with pytest.raises(TimeoutError, match=r"readers \[0\] of the mailbox did not keep up within 0\.1 s"):
        writer.send(b"three", 0.1)
    with pytest.raises(ConnectionError, match="aborted by party 0"):
        reader.receive(1.0)
    writer.close()
    reader.close()


def test_an_abort_from_another_thread_ends_a_pending_receive():
    writer, reader = _pair()
    threading.Timer(0.1, reader.abort).start()
    with pytest.raises(ConnectionError, match="aborted by party 1"):  # and not a TimeoutError
        reader.receive(PATIENCE_S)
    with pytest.raises(ConnectionError):
        writer.send(b"late", 1.0)
    writer.close()
    reader.close()
    with pytest.raises(ConnectionError, match="closed"):
        reader.receive(1.0)


def _window(number: int) -> Window:
    proposals = np.arange(128, dtype=np.int32).reshape(2, 64)
    return Window(
        number,
        -5,
        np.array([2, 0], np.int32),
        np.array([7, 8], np.int32),
        np.array([1, 1], np.int32),
        proposals,
        proposals.astype(np.float32),
    )


def test_a_bridge_carries_windows_one_way_and_verdicts_the_other_and_counts_them():
    windows, verdicts = _pair(), _pair()
    draft, target = Bridge(windows[0], verdicts[1]), Bridge(windows[1], verdicts[0])
    for number in range(3):
        draft.send_window(_window(number))
        window = target.receive_window(number, timeout_s=1.0)
        assert (window.round, window.checksum) == (number, -5)
        assert np.array_equal(window.proposal_probs_MK, _window(number).proposal_probs_MK)
        target.send_verdict(VerdictMessage(number, np.array([1, 0], np.int32), np.array([-1, 9], np.int32)))
        assert draft.receive_verdict(number).tokens_S.tolist() == [-1, 9]
    assert draft.traffic.num_sent == draft.traffic.num_received == 3
    assert draft.traffic.bytes_sent == target.traffic.bytes_received == 3 * len(_window(0).to_bytes())
    draft.close()
    target.close()


def test_a_message_of_another_round_stops_the_round():
    windows, verdicts = _pair(), _pair()
    draft, target = Bridge(windows[0], verdicts[1]), Bridge(windows[1], verdicts[0])
    draft.send_window(_window(4))
    with pytest.raises(ReplicaDivergedError, match="window of round 4 came where that of round 5 was due"):
        target.receive_window(5)
    draft.abort()
    with pytest.raises(ConnectionError):
        target.receive_window(5)
    with pytest.raises(TimeoutError):
        Bridge(None, _pair()[1]).receive_verdict(0, timeout_s=0.05)
    draft.close()
    target.close()
