"""Incremental detokenisation against decoding everything at once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pearl_ray.core.detokenizer import Detokenizer

SKIPPED = 256  # a special token: decodes to nothing


class ByteDecoder:
    """A byte-level tokenizer: id = byte, or a piece of several bytes; counts what it is asked to decode."""

    def __init__(self, pieces: Sequence[bytes] = ()) -> None:
        self.pieces = [bytes([b]) for b in range(256)] + [b"", *pieces]
        self.num_decoded = 0

    def __call__(self, ids: list[int]) -> str:
        self.num_decoded += len(ids)
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


def strip_leading_space(ids: list[int]) -> str:
    """A sentencepiece-like decoder: pieces carry their leading space, the first one of a text is dropped."""
    words = ["a", " b", " the", "né", " ", "!"]
    return "".join(words[i] for i in ids).removeprefix(" ")


def naive_stop(text: str, stop: Sequence[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first end of any stop string, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def split(draw_from: random.Random, data: bytes) -> list[bytes]:
    """Bytes cut anywhere, also inside characters."""
    pieces, at = [], 0
    while at < len(data):
        size = draw_from.randint(1, 4)
        pieces.append(data[at : at + size])
        at += size
    return pieces


def run(detokenizer: Detokenizer, ids: Sequence[int], sizes: Sequence[int]) -> tuple[str, str | None, int]:
    """All tokens through the detokenizer in calls of the given sizes; text, stop reason, tokens used."""
    text, at, reason, used = "", 0, None, 0
    for size in [*sizes, *([1] * len(ids))]:
        if at >= len(ids) or reason is not None:
            break
        delta = detokenizer.append(ids[at : at + size])
        text, reason, used = text + delta.text, delta.stop_reason, delta.num_tokens_used
        at += size
    text += detokenizer.finish()
    assert text == detokenizer.text
    return text, reason, used


texts = st.text(alphabet="aab<>/ \néß你好😀\u200d\ufffd", max_size=60)
stops = st.lists(st.text(alphabet="ab<>é你😀", min_size=1, max_size=4), max_size=3)
sizes = st.lists(st.integers(1, 5), max_size=30)


@settings(max_examples=300, deadline=None)
@given(text=texts, stop=stops, sizes=sizes, include=st.booleans(), seed=st.integers(0, 2**16))
def test_text_and_stop_are_those_of_the_whole_text_however_it_is_cut(
    text: str, stop: list[str], sizes: list[int], include: bool, seed: int
) -> None:
    pieces = split(random.Random(seed), text.encode())
    decode = ByteDecoder(pieces)
    ids = list(range(257, 257 + len(pieces)))
    got, reason, used = run(Detokenizer(decode, (), stop, include), ids, sizes)
    assert (got, reason) == naive_stop(text, stop, include)
    if reason is None:
        assert used == len(ids)


@settings(max_examples=200, deadline=None)
@given(text=texts, stop=stops, seed=st.integers(0, 2**16))
def test_the_last_token_used_is_the_one_that_completes_the_stop_string(text: str, stop: list[str], seed: int) -> None:
    text = text.replace("\ufffd", "")
    pieces = split(random.Random(seed), text.encode())
    ids = list(range(257, 257 + len(pieces)))
    _, reason, used = run(Detokenizer(ByteDecoder(pieces), (), stop), ids, [7, 7, 7])
    if reason is not None:
        ends = [b"".join(pieces[:n]).decode(errors="ignore") for n in range(len(pieces) + 1)]
        assert any(s in ends[used] for s in stop)
        assert not any(s in ends[used - 1] for s in stop)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, SKIPPED), max_size=120), prompt=st.lists(st.integers(0, 127), max_size=12))
def test_random_bytes_come_out_as_decoding_them_at_once(ids: list[int], prompt: list[int]) -> None:
    decode = ByteDecoder()
    text, _, _ = run(Detokenizer(decode, prompt), ids, [1])
    assert text == decode(prompt + ids)[len(decode(prompt)) :]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 5), max_size=60), num_prompt=st.integers(0, 20))
def test_a_leading_space_is_kept_behind_a_prompt(ids: list[int], num_prompt: int) -> None:
    prompt = [0] * num_prompt
    text, _, _ = run(Detokenizer(strip_leading_space, prompt), ids, [2, 1])
    assert text == strip_leading_space(prompt + ids)[num_prompt:]


def test_a_character_is_released_when_its_last_byte_arrives() -> None:
    detokenizer = Detokenizer(ByteDecoder())
    assert [detokenizer.append([b]).text for b in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert detokenizer.text == "a€b"


def test_an_incomplete_character_at_the_end_is_given_by_finish() -> None:
    detokenizer = Detokenizer(ByteDecoder())
    assert detokenizer.append(list("a€".encode())[:-1]).text == "a"
    assert detokenizer.finish() == "\ufffd"


def test_a_character_that_the_prompt_began_is_completed_in_the_output() -> None:
    first, *rest = "€".encode()
    detokenizer = Detokenizer(ByteDecoder(), [97, first])
    assert detokenizer.append(rest).text == "€"
    detokenizer = Detokenizer(ByteDecoder(), [97, first])
    assert detokenizer.append([98]).text == "b", "the broken character belongs to the prompt"
    detokenizer = Detokenizer(ByteDecoder(), list("a\ufffd".encode()))
    assert detokenizer.append([98]).text == "b"


def test_the_start_of_a_stop_string_is_held_until_it_is_decided() -> None:
    detokenizer = Detokenizer(ByteDecoder(), stop=["</s>"])
    assert [detokenizer.append([b]).text for b in b"x</"] == ["x", "", ""]
    assert detokenizer.append([ord("b")]).text == "</b"
    delta = detokenizer.append(list(b"y</s>zzz"))
    assert (delta.text, delta.stop_reason, delta.num_tokens_used) == ("y", "</s>", 9)
    assert detokenizer.text == "x</by"
    assert detokenizer.finish() == ""


def test_a_held_start_is_released_by_finish() -> None:
    detokenizer = Detokenizer(ByteDecoder(), stop=["END"])
    assert detokenizer.append(list(b"the EN")).text == "the "
    assert detokenizer.finish() == "EN"
    assert detokenizer.text == "the EN"


def test_of_two_stop_strings_the_one_complete_first_counts_and_the_longest_of_a_tie() -> None:
    def stopped_by(text: bytes, *stop: str) -> tuple[str, str | None]:
        detokenizer = Detokenizer(ByteDecoder([text]), stop=stop)
        delta = detokenizer.append([257])
        return delta.text, delta.stop_reason

    assert stopped_by(b"xabcd", "abcd", "bc") == ("xa", "bc")
    assert stopped_by(b"xabc", "c", "bc", "abc") == ("x", "abc")
    assert stopped_by(b"aaab", "aab") == ("a", "aab")


def test_stop_strings_within_min_tokens_are_passed_over() -> None:
    detokenizer = Detokenizer(ByteDecoder(), stop=["."], min_tokens=3)
    delta = detokenizer.append(list(b"a.b.c."))
    assert (delta.text, delta.num_tokens_used) == ("a.b", 4)


def test_nothing_can_be_appended_behind_a_stop_string() -> None:
    detokenizer = Detokenizer(ByteDecoder(), stop=["."])
    detokenizer.append([ord(".")])
    with pytest.raises(AssertionError):
        detokenizer.append([97])


@pytest.mark.parametrize("kind", ["ascii", "chinese", "random bytes", "continuation bytes"])
def test_the_cost_per_token_does_not_grow_with_the_text(kind: str) -> None:
    rng = random.Random(0)
    ids = {
        "ascii": [rng.randint(32, 126) for _ in range(4000)],
        "chinese": list(("你好吗" * 450).encode())[:4000],
        "random bytes": [rng.randint(0, 255) for _ in range(4000)],
        "continuation bytes": [rng.randint(128, 191) for _ in range(4000)],
    }[kind]
    decode = ByteDecoder()
    detokenizer = Detokenizer(decode, stop=["never seen"])
    detokenizer.append(ids[:2000])
    first = decode.num_decoded
    detokenizer.append(ids[2000:])
    assert decode.num_decoded - first < 1.2 * first
    assert decode.num_decoded < 30 * len(ids)
    detokenizer.finish()
    assert detokenizer.text == ByteDecoder()(ids)
