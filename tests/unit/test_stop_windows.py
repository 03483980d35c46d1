"""Stops inside windows, through controller, shards and detokenizer: against a reference that looks at the whole text.

A scripted model writes given bytes, cut into tokens anywhere, inside characters too; its draft is wrong where the test
says so. Rounds therefore commit any number of tokens, and a stop lies in the middle of a round, at its end, or in two.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pearl_ray.core import requests
from pearl_ray.core.controller import Controller
from pearl_ray.core.detokenizer import Decode, Detokenizer, TextDelta
from pearl_ray.core.outputs import CompletionOutput
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Mode
from pearl_ray.core.windows import WindowPolicy
from tests.simulation import Simulation

END = 0  # the end-of-text token; decodes to nothing
FIRST = 1  # ids from here on are the script's tokens, in order
PROMPT = (END,)


class Script:
    """A model that writes a given list of tokens; where ``wrong`` says so, another."""

    def __init__(self, tokens: Sequence[int], vocab_size: int, wrong: Collection[int] = ()) -> None:
        self._tokens, self._vocab_size, self._wrong = tokens, vocab_size, wrong

    def logits(self, prefix: Sequence[int]) -> np.ndarray:
        at = len(prefix) - len(PROMPT)
        token = self._tokens[at] if at < len(self._tokens) else END
        logits = np.zeros(self._vocab_size)
        logits[(token + 1) % self._vocab_size if at in self._wrong else token] = 9.0
        return logits


@dataclass(frozen=True, slots=True)
class Case:
    """A text in pieces, one token each (equal pieces are different ids), and where the draft is wrong."""

    pieces: tuple[bytes, ...]
    wrong: frozenset[int] = frozenset()
    mode: Mode = "pearl"
    window: int = 4
    lag: int = 0

    @property
    def tokens(self) -> list[int]:
        return list(range(FIRST, FIRST + len(self.pieces)))

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i - FIRST] for i in ids if i != END).decode("utf-8", errors="replace")


def answer(case: Case, **options: object) -> CompletionOutput:
    """What the engine gives; the stream must say the same."""
    vocab_size = FIRST + len(case.pieces)
    target = Script(case.tokens, vocab_size)
    simulation = Simulation(
        mode=case.mode,
        window=case.window,
        max_model_len=512,
        num_blocks=256,
        target=target,  # type: ignore[arg-type]
        draft=Script(case.tokens, vocab_size, case.wrong),  # type: ignore[arg-type]
    )
    simulation.controller = Controller(
        replace(simulation.controller.config, eos_token_ids=frozenset({END}), vocab_size=vocab_size),
        simulation.pools[0],
        simulation.pools[1] if case.mode != "ar" else None,
        WindowPolicy(case.mode, case.window, None),
        decode=case.decode,
        clock=lambda: float(next(simulation.clock)),
    )
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 200} | options))  # type: ignore[arg-type]
    request = simulation.controller.submit("r", None, PROMPT, params)
    simulation.collect()
    while simulation.round():
        while len(simulation.summaries) > case.lag:
            simulation.deliver_summary()
    simulation.run()
    simulation.assert_at_rest()
    output = request.output().outputs[0]
    assert "".join(update.text for update in simulation.updates) == output.text
    assert [token for update in simulation.updates for token in update.token_ids] == output.token_ids
    reasons = [(u.finish_reason, u.stop_reason) for u in simulation.updates if u.finish_reason is not None]
    assert reasons == [(output.finish_reason, output.stop_reason)]
    assert len(output.origins) == len(output.token_ids)
    return output


@dataclass(frozen=True, slots=True)
class Expected:
    """The reference's answer."""

    text: str
    num_tokens: int
    finish_reason: str
    stop_reason: int | str | None


def reference(
    case: Case,
    *,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    min_tokens: int = 0,
    max_tokens: int = 200,
) -> Expected:
    """Looks at all the text so far after every token, and at every end of every stop string in it."""
    tokens = [*case.tokens, END]
    seen = 0  # characters that earlier tokens completed
    for count, token in enumerate(tokens, 1):
        ends_by_token = count >= min_tokens and (token in stop_token_ids or token == END)
        if not ends_by_token:
            text = whole(case, tokens[:count])
            for end in range(seen + 1, len(text) + 1):
                found = [s for s in stop if text[:end].endswith(s)]
                if found and count > min_tokens:
                    longest = max(found, key=len)
                    return Expected(text[: end - len(longest)], count, "stop", longest)
            seen = len(text)
        if ends_by_token:
            return Expected(case.decode(tokens[: count - 1]), count, "stop", None if token == END else token)
        if count == max_tokens:
            return Expected(case.decode(tokens[:count]), count, "length", None)
    raise AssertionError("a script ends in END")


def whole(case: Case, tokens: Sequence[int]) -> str:
    """The text without a character that isn't complete."""
    return b"".join(case.pieces[i - FIRST] for i in tokens if i != END).decode("utf-8", errors="ignore")


def check(case: Case, **options: object) -> Expected:
    expected = reference(case, **options)  # type: ignore[arg-type]
    found = answer(case, **options)
    assert (found.text, len(found.token_ids), found.finish_reason, found.stop_reason) == (
        expected.text,
        expected.num_tokens,
        expected.finish_reason,
        expected.stop_reason,
    )
    assert found.token_ids == [*case.tokens, END][: expected.num_tokens]
    return expected


def cut(text: str, chance: random.Random, longest: int = 4) -> tuple[bytes, ...]:
    """Bytes cut anywhere."""
    data, pieces = text.encode(), []
    while data:
        size = chance.randint(1, longest)
        pieces.append(data[:size])
        data = data[size:]
    return tuple(pieces)


TEXTS = st.text(alphabet="aab<>é你😀 ", min_size=1, max_size=40)
STOPS = st.lists(st.text(alphabet="ab<>é你😀", min_size=1, max_size=4), max_size=3)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pieces = cut(draw(TEXTS), random.Random(draw(st.integers(0, 2**16))))
    wrong = draw(st.frozensets(st.integers(0, len(pieces)), max_size=4))
    mode = draw(st.sampled_from(["pearl", "pearl", "sd", "ar"]))
    return Case(pieces, wrong, mode, draw(st.integers(1, 8)), draw(st.integers(0, 2)))


@settings(max_examples=150, deadline=None)
@given(case=cases(), stop=STOPS)
def test_stop_strings_end_the_text_where_the_whole_text_says(case: Case, stop: list[str]) -> None:
    check(case, stop=stop)


@settings(max_examples=120, deadline=None)
@given(
    case=cases(),
    stop=STOPS,
    places=st.lists(st.integers(0, 40), max_size=2),
    min_tokens=st.integers(0, 12),
    max_tokens=st.integers(12, 30),
)
def test_stop_strings_stop_tokens_and_both_bounds_together_end_it_where_the_first_of_them_does(
    case: Case, stop: list[str], places: list[int], min_tokens: int, max_tokens: int
) -> None:
    ids = [FIRST + place % len(case.pieces) for place in places]
    # The script's own tokens can't be masked away, or the model would write something else: those come later.
    ids = [token for token in ids if token - FIRST >= min_tokens]
    least = min(min_tokens, len(case.pieces))
    check(case, stop=stop, stop_token_ids=ids, min_tokens=least, max_tokens=max_tokens)


@pytest.mark.parametrize("wrong", [frozenset(), frozenset({0}), frozenset({2, 5}), frozenset(range(40))])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("at", range(9))
def test_a_stop_string_is_found_wherever_the_windows_end(at: int, window: int, wrong: frozenset[int]) -> None:
    """``STOP`` over two to four tokens, at every offset: in one round, at its end, or straddling two."""
    text = "-" * at + "STOP" + "+" * 12
    for longest in (1, 2, 3):
        pieces = tuple(text[i : i + longest].encode() for i in range(0, len(text), longest))
        found = answer(Case(pieces, wrong, window=window), stop=["STOP"])
        assert (found.text, found.finish_reason, found.stop_reason) == ("-" * at, "stop", "STOP")
        assert len(found.token_ids) == -(-(at + 4) // longest)


def test_a_round_that_commits_several_tokens_may_end_in_the_middle_of_them() -> None:
    case = Case(tuple(bytes([c]) for c in b"abcdefghijklmnop"), window=8)
    found = answer(case, stop=["k"])
    assert found.text == "abcdefghij" and len(found.token_ids) == 11
    assert found.origins[2:] == ["post_verify"] * 9  # a window of 8 was committed whole, and cut


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_stop_string_of_several_byte_characters_is_found_over_any_cut(window: int) -> None:
    text = "ab😀é你cd"
    data = text.encode()
    for size in range(1, len(data)):
        pieces = tuple(data[i : i + size] for i in range(0, len(data), size))
        expected = check(Case(pieces, frozenset({1}), window=window), stop=["😀é你"])
        assert expected.text == "ab" and expected.stop_reason == "😀é你"


def test_half_a_character_before_a_stop_is_told_as_what_it_is() -> None:
    pieces = (b"a", "é".encode()[:1], b"END", b"x")
    found = answer(Case(pieces), stop=["END"])
    assert (found.text, found.stop_reason, len(found.token_ids)) == ("a\ufffd", "END", 3)


def test_of_overlapping_stop_strings_the_one_complete_first_counts() -> None:
    pieces = tuple(bytes([c]) for c in b"xxabababcyy")
    assert check(Case(pieces), stop=["ababc", "bab"]).stop_reason == "bab"
    assert check(Case(pieces), stop=["ababc"]).text == "xxab"
    assert check(Case((b"xx", b"ababab", b"cyy")), stop=["c", "abc", "babc"]).stop_reason == "babc"


def test_a_stop_string_that_min_tokens_passes_over_stays_in_the_text() -> None:
    pieces = tuple(bytes([c]) for c in b"a.b.c.d")
    for window in (1, 3, 8):
        expected = check(Case(pieces, window=window), stop=["."], min_tokens=4)
        assert expected.text == "a.b.c" and expected.num_tokens == 6


def test_a_stop_string_begun_within_min_tokens_and_complete_behind_them_counts() -> None:
    expected = check(Case(tuple(bytes([c]) for c in b"xSTOPy")), stop=["STOP"], min_tokens=4)
    assert (expected.text, expected.num_tokens) == ("x", 5)


def test_a_stop_token_has_no_text_and_counts_before_a_stop_string_that_its_text_would_complete() -> None:
    case = Case((b"x", b"ST", b"OP", b"y"))
    found = check(case, stop=["STOP"], stop_token_ids=[FIRST + 2])
    assert (found.text, found.stop_reason, found.num_tokens) == ("xST", FIRST + 2, 3)


def test_what_looked_like_the_start_of_a_stop_string_is_given_out_at_the_end() -> None:
    for max_tokens, text in ((3, "xST"), (4, "xSTO")):
        found = check(Case((b"x", b"S", b"T", b"O", b"!")), stop=["STOP"], max_tokens=max_tokens)
        assert (found.text, found.finish_reason) == (text, "length")


class OneRoundOnly(Detokenizer):
    """A twin that looks for stop strings in each round's text alone."""

    def __init__(self, decode: Decode, prompt_ids: Sequence[int] = (), stop: Sequence[str] = (), **_: object) -> None:
        super().__init__(decode, prompt_ids)
        self._search = lambda: Detokenizer(decode, (), stop)

    def append(self, token_ids: Sequence[int]) -> TextDelta:
        found = self._search().append(token_ids)
        delta = super().append(token_ids[: found.num_tokens_used])
        text = delta.text.removesuffix(found.stop_reason or "")
        self._released = [*self._released[:-1], text]
        return TextDelta(text, found.stop_reason, delta.num_tokens_used)


def test_the_reference_sees_a_search_that_looks_at_one_round_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = tuple(bytes([c]) for c in b"--STOP++++++++++")
    monkeypatch.setattr(requests, "Detokenizer", OneRoundOnly)
    check(Case(pieces, window=8), stop=["STOP"])  # all of it in one round
    with pytest.raises(AssertionError):
        check(Case(pieces, frozenset({4}), window=8), stop=["STOP"])
