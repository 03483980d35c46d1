"""What a client's batches hold, whatever ends together."""

from __future__ import annotations

import asyncio

import pytest

from pearl_ray.actors.clients import Batch, Clients
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Commit
from pearl_ray.core.requests import Request, make_request


def a_request(name: str, n: int, most: int) -> Request:
    return make_request(
        name,
        None,
        [1],
        SamplingParams(n=n, max_tokens=most),
        seed=0,
        rejection=False,
        eos_token_ids=frozenset(),
        max_total=1 + most,
        decode=lambda ids: "x" * len(ids),
        now=0.0,
    )


def heard(clients: Clients, client_id: str) -> Batch:
    return asyncio.run(clients.next_batch(client_id, 1.0))


@pytest.mark.parametrize("aborted", [False, True])
def test_answers_that_end_in_one_round_all_give_their_last_tokens(aborted: bool) -> None:
    clients, request = Clients(), a_request("r", n=3, most=3 if aborted else 2)
    clients.add("c", request)
    for answer in request.answers:
        answer.commit(Commit((5, 6), ("prefill", "target")))
        if aborted:
            answer.abort()
    clients.deliver([update for a in request.answers if (update := a.take_update("r")) is not None])
    batch = heard(clients, "c")
    reason = "abort" if aborted else "length"
    assert [(u.index, u.text, u.finish_reason) for u in batch.updates] == [(i, "xx", reason) for i in range(3)]
    assert [output.request_id for output in batch.finished] == ["r"]
    assert clients.drop("c") == []


def test_an_output_comes_once_with_the_last_answers_end() -> None:
    clients, request = Clients(), a_request("r", n=2, most=1)
    clients.add("c", request)
    for number, answer in enumerate(request.answers):
        answer.commit(Commit((5,), ("prefill",)))
        clients.deliver([answer.take_update("r")])
        assert len(heard(clients, "c").finished) == number
