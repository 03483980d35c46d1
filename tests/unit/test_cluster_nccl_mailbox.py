"""The staging, frames, deadlines and abort of the mailbox over NCCL, here over gloo on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from pearl_ray.cluster.nccl_mailbox import NcclMailbox
from pearl_ray.cluster.torch_group import TorchGroup, join_store, serve_store
from tests.together import together

PATIENCE_S = 60.0  # for what must come: loaded machines stall


def staged_pair(
    name: str, work: Callable[[NcclMailbox], object], answer: Callable[[NcclMailbox], object]
) -> list[object]:
    """What ``work`` makes of the writer and ``answer`` of the reader, in a thread each."""
    store, port = serve_store("127.0.0.1")

    def party(rank: int, job: Callable[[NcclMailbox], object]) -> object:
        group = TorchGroup("gloo", join_store("127.0.0.1", port), rank, 2, PATIENCE_S, name=name, host="127.0.0.1")
        mailbox = NcclMailbox(group, torch.device("cpu"), frame_bytes=128, piece_bytes=256, timeout_s=PATIENCE_S)
        try:
            return job(mailbox)
        finally:
            mailbox.close()

    results = together(lambda: party(0, work), lambda: party(1, answer))
    del store
    return results


MESSAGES = [
    b"",
    b"x",
    bytes(range(111)),
    bytes(range(112)),
    bytes(range(113)),
    b"long" * 500,
    b"\0" * (112 + 256),
    b"end",
]


def test_messages_of_every_size_pass_the_staging_buffers_in_order():
    def send(mailbox: NcclMailbox) -> None:
        for message in MESSAGES * 3:
            mailbox.send(message, PATIENCE_S)

    assert staged_pair("sizes", send, lambda m: [m.receive(PATIENCE_S) for _ in MESSAGES * 3]) == [None, MESSAGES * 3]


def test_a_receive_that_ran_into_its_deadline_goes_on_where_it_was():
    waited = threading.Event()

    def send(mailbox: NcclMailbox) -> None:
        assert waited.wait(PATIENCE_S)
        mailbox.send(b"long" * 500, PATIENCE_S)

    def receive(mailbox: NcclMailbox) -> bytes:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                mailbox.receive(0.05)
        waited.set()
        return mailbox.receive(PATIENCE_S)

    assert staged_pair("again", send, receive) == [None, b"long" * 500]


def test_an_abort_from_another_thread_ends_a_pending_receive_and_all_later_calls():
    done = threading.Event()

    def receive(mailbox: NcclMailbox) -> str:
        threading.Timer(0.1, mailbox.abort).start()
        try:
            with pytest.raises(ConnectionError, match="aborted"):
                mailbox.receive(PATIENCE_S)
            with pytest.raises(ConnectionError, match="aborted"):
                mailbox.receive(PATIENCE_S)
        finally:
            done.set()
        return "ended"

    assert staged_pair("abort", lambda m: done.wait(PATIENCE_S), receive) == [True, "ended"]


def test_a_writer_whose_reader_is_gone_is_told_within_its_deadline():
    gone = threading.Event()

    def send(mailbox: NcclMailbox) -> str:
        assert gone.wait(PATIENCE_S)
        with pytest.raises((TimeoutError, ConnectionError)):
            for _ in range(1000):
                mailbox.send(b"to nobody" * 30, 0.5)
        with pytest.raises(ConnectionError):
            mailbox.send(b"", 0.5)
        return "told"

    def leave(mailbox: NcclMailbox) -> None:
        mailbox.close()
        gone.set()

    assert staged_pair("gone", send, leave)[0] == "told"


def test_a_frame_that_is_not_the_one_due_ends_the_mailbox():
    def send(mailbox: NcclMailbox) -> None:
        mailbox.send(b"first", PATIENCE_S)
        mailbox._num_messages += 1  # as if a broadcast had left an older frame in the reader's buffer
        mailbox.send(b"second", PATIENCE_S)

    def receive(mailbox: NcclMailbox) -> str:
        assert mailbox.receive(PATIENCE_S) == b"first"
        with pytest.raises(ConnectionError, match="message 2 was due and not message 3"):
            mailbox.receive(PATIENCE_S)
        return "refused"

    assert staged_pair("number", send, receive) == [None, "refused"]
