"""Channels of typed messages: order, readiness, strangers, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import time

import pytest
import zmq

from pearl_ray.cluster import channels
from pearl_ray.cluster.channels import Inbox, Outbox
from pearl_ray.core.messages import PlanDiff, SetWindow, Stamp, Stop, encode

PATIENCE_S = 60.0  # for what must come: loaded machines stall


@pytest.fixture(params=[None, "127.0.0.1"], ids=["ipc", "tcp"])
def inbox(request):
    with Inbox(request.param) as inbox:
        yield inbox


@pytest.fixture
def patient_outboxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing waits until all is handed over, however long a stalled machine takes to connect."""
    monkeypatch.setattr(channels, "LINGER_MS", round(1000 * PATIENCE_S))


def test_messages_of_a_sender_arrive_whole_and_in_order(inbox):
    with Outbox(inbox.endpoint) as outbox:
        sent = [PlanDiff(epoch, [SetWindow(1, epoch)]) for epoch in range(200)] + [Stop()]
        for message in sent:
            outbox.send(message)
        received = [inbox.receive(PATIENCE_S) for _ in range(150)]
        while len(received) < len(sent):
            received += inbox.drain()
        assert received == sent
        assert inbox.receive(0.0) is None
        start = time.monotonic()
        assert inbox.receive(0.05) is None
        assert time.monotonic() - start >= 0.04


def test_what_is_queued_when_an_outbox_closes_still_arrives(inbox, patient_outboxes):
    outbox = Outbox(inbox.endpoint)
    outbox.send(Stamp(1, 2))
    outbox.close()
    assert inbox.receive(PATIENCE_S) == Stamp(1, 2)


def test_a_stranger_without_the_token_is_dropped_and_counted():
    with Inbox() as inbox, Outbox(inbox.endpoint) as outbox, zmq.Context() as context:
        stranger = context.socket(zmq.PUSH)
        stranger.connect(inbox.endpoint.partition("#")[0])
        stranger.send_multipart((b"x" * 16, encode(Stop())))
        stranger.send(b"\xff" * 1000)
        while inbox.num_dropped < 2:
            assert inbox.receive(0.05) is None
        outbox.send(Stamp(3, 4))
        assert inbox.receive(PATIENCE_S) == Stamp(3, 4)
        stranger.close(linger=0)


def test_over_tcp_a_stranger_without_the_server_key_does_not_even_get_to_speak():
    with Inbox("127.0.0.1") as inbox, zmq.Context() as context:
        address, _, key = inbox.endpoint.partition("#")
        stranger = context.socket(zmq.PUSH)
        stranger.connect(address)
        stranger.send_multipart((bytes.fromhex(key.partition(".")[0]), encode(Stop())))
        assert inbox.receive(0.5) is None
        assert inbox.num_dropped == 0
        stranger.close(linger=0)


def test_an_event_loop_wakes_for_each_batch(inbox, patient_outboxes):
    async def read(count: int) -> list[object]:
        messages: list[object] = []
        while len(messages) < count:
            messages += await asyncio.wait_for(inbox.next(), PATIENCE_S)
        return messages

    sent = [Stamp(number, 0) for number in range(60)]

    def send() -> None:
        with Outbox(inbox.endpoint) as outbox:
            for number, message in enumerate(sent):
                outbox.send(message)
                time.sleep(0.002 if number % 7 == 0 else 0)

    sender = threading.Thread(target=send)
    sender.start()
    assert asyncio.run(read(len(sent))) == sent
    sender.join()


def test_the_socket_file_is_in_a_private_folder_that_goes_with_the_inbox(tmp_path):
    inbox = Inbox()
    path = inbox.endpoint.removeprefix("ipc://").partition("#")[0]
    folder = os.path.dirname(path)
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    inbox.close()
    assert not os.path.exists(folder)
    with Inbox(folder=str(tmp_path)) as shared:
        assert os.path.dirname(shared.endpoint.removeprefix("ipc://")) == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_outbox_closes_within_its_bound_though_nobody_listens():
    inbox = Inbox()
    endpoint = inbox.endpoint
    inbox.close()
    outbox = Outbox(endpoint)
    outbox.send(Stop())
    start = time.monotonic()
    outbox.close()
    assert time.monotonic() - start < PATIENCE_S  # it lingers for a second, and not for ever


def test_an_endpoint_without_a_token_is_refused():
    with pytest.raises(ValueError, match="lacks the deployment's token"):
        Outbox("tcp://127.0.0.1:5555")
