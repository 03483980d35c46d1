"""Which partings of PEARL's and AR's texts pass for rounding: those no wider than what rounding was seen to move."""

from __future__ import annotations

import pytest

from benchmarks.hot_texts import compare
from pearl_ray.core.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from pearl_ray.core.params import SamplingParams

TEXT = [5, 6, 7, 8]
PARTED = [5, 6, 107, 1]
WRONG = [5, 6, 9, 1]


class Told:
    """An engine whose target's top two are ``gaps`` apart at each token, and in PEARL's passes ``moved`` more."""

    def __init__(self, gaps: list[float], moved: float, pearl: list[int]) -> None:
        self._gaps, self._moved, self._pearl = gaps, moved, pearl

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
        """The same answer to each prompt."""
        is_ar = params.num_speculative_tokens == 0
        tokens = TEXT if is_ar or params.logprobs is not None else self._pearl
        logprobs = None
        if params.logprobs is not None:
            gaps = [gap + (0.0 if is_ar else self._moved) for gap in self._gaps]
            logprobs = [
                {token: Logprob(-0.1), token + 100: Logprob(-0.1 - gap)}
                for token, gap in zip(tokens, gaps, strict=True)
            ]
        answer = CompletionOutput(index=0, text="", token_ids=tokens, logprobs=logprobs)
        output = RequestOutput(
            request_id="r", prompt=None, prompt_token_ids=[1], outputs=[answer], finished=True, metrics=RequestMetrics()
        )
        return [output] * len(prompts)


@pytest.mark.parametrize(
    ("gap", "moved", "pearl", "unexplained"),
    [
        (0.5, 0.25, TEXT, 0),  # nothing parts
        (0.25, 0.25, PARTED, 0),
        (0.5, 0.25, PARTED, 1),  # further apart than rounding goes
        (0.5, 0.0, PARTED, 1),
        (0.25, 0.25, WRONG, 1),  # a token that is none of the likeliest
        (1.5, 4.0, PARTED, 1),  # what moves a distance by so much is no rounding
    ],
)
def test_a_parting_wider_than_what_rounding_moves_isnt_explained(gap, moved, pearl, unexplained):
    found = compare(Told([3.0, 3.0, gap, 3.0], moved, pearl), [[1], [2]], len(TEXT))
    assert found["unexplained"] == 2 * unexplained
    assert found["parted"] == (0 if pearl is TEXT else 2) and found["equal"] == (2 if pearl is TEXT else 0)
    assert found["tokens_equal"] == (8 if pearl is TEXT else 4)
