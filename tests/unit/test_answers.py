"""What an answer keeps and tells of the tokens committed to it, however commits and updates alternate."""

from __future__ import annotations

import random

import pytest

from pearl_ray.core.messages import TokenLogprobs
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Commit
from pearl_ray.core.requests import Answer, Update, make_request

EOS = 26


def letters(ids: list[int]) -> str:
    return "".join(chr(ord("a") + i) if i < EOS else "" for i in ids)


def new_answer(params: SamplingParams) -> Answer:
    request = make_request(
        "r",
        None,
        [0, 1],
        params,
        seed=0,
        rejection=False,
        eos_token_ids=frozenset({EOS}),
        max_total=2 + (params.max_tokens or 100),
        decode=letters,
        now=0.0,
    )
    return request.answers[0]


def commit_all(answer: Answer, tokens: list[int], draw: random.Random) -> list[Update]:
    """Commit them in groups, with an update now and then and one at the end."""
    updates, at = [], 0
    while at < len(tokens) and answer.finish_reason is None:
        group = tuple(tokens[at : at + draw.randint(1, 6)])
        logprobs = [TokenLogprobs(token, -float(token), 1, [], []) for token in group]
        before = len(answer.token_ids)
        grown = answer.commit(Commit(group, ("post_verify",) * (len(group) - 1) + ("residual",)), logprobs)
        assert grown == len(answer.token_ids) - before
        at += len(group)
        if draw.random() < 0.5:
            updates.append(answer.take_update("r"))
    updates.append(answer.take_update("r"))
    assert answer.take_update("r") is None or answer.finish_reason is not None
    return [update for update in updates if update is not None]


@pytest.mark.parametrize(
    ("params", "tokens", "kept", "text", "reasons"),
    [
        (SamplingParams(max_tokens=5), [7, 8, 9, 10, 11, 12, 13], 5, "hijkl", ("length", None)),
        (SamplingParams(), [7, 8, EOS, 9, 10, 11, 12], 3, "hi", ("stop", None)),
        (SamplingParams(stop="jk"), [7, 8, 9, 10, 11, 12, 13], 4, "hi", ("stop", "jk")),
        (SamplingParams(stop="jk", max_tokens=4), [7, 8, 9, 10, 11, 12], 4, "hi", ("stop", "jk")),
        (SamplingParams(stop="xy"), [7, 8, 23, 10, 11, 12, EOS], 7, "hixklm", ("stop", None)),
    ],
)
def test_updates_together_are_the_answer_and_nothing_behind_its_stop(params, tokens, kept, text, reasons):
    params = SamplingParams(max_tokens=params.max_tokens or 100, stop=params.stop, logprobs=0)
    for seed in range(40):
        answer = new_answer(params)
        updates = commit_all(answer, tokens, random.Random(seed))
        output = answer.output()
        assert output.token_ids == tokens[:kept] and output.text == text
        assert (output.finish_reason, output.stop_reason) == reasons
        assert [token for update in updates for token in update.token_ids] == output.token_ids
        assert [origin for update in updates for origin in update.origins] == output.origins
        assert [entry for update in updates for entry in update.logprobs or ()] == output.logprobs
        assert "".join(update.text for update in updates) == text
        assert len(output.origins) == len(output.logprobs or ()) == kept
