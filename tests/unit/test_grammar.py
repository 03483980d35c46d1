"""Grammars: masks along a window against plain string comparison, sequences of a batch, and refusals."""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from pearl_ray.actors.grammars import Grammars
from pearl_ray.core.errors import ConfigError
from pearl_ray.core.messages import Join, PlanDiff, decode, encode
from pearl_ray.core.params import SamplingParams, StructuredOutputsParams
from pearl_ray.core.replica import Replica
from pearl_ray.core.schedule import Limits
from pearl_ray.model.grammar import GrammarCompiler
from pearl_ray.model.tokenizer import Tokenizer
from tests.tiny import BOS_ID, EOS_ID, JSON_PIECES, tiny_tokenizer

Wanted = StructuredOutputsParams


@functools.cache
def json_tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer(JSON_PIECES))


@functools.cache
def json_compiler() -> GrammarCompiler:
    return GrammarCompiler(json_tokenizer(), len(json_tokenizer().tokens))


def spelled(text: str) -> list[int]:
    return json_tokenizer().encode(text, add_special_tokens=False)


def ids_of(mask_V: torch.Tensor | None) -> set[int]:
    assert mask_V is not None
    return set(mask_V.nonzero()[:, 0].tolist())


# -- masks ---------------------------------------------------------------------------------------------------------


def allowed_by(language: Sequence[str], tokenizer: Tokenizer, tokens: Sequence[int], num_valid: int) -> set[int]:
    """The ids that may follow, by comparing strings: the language is every answer there is."""
    if EOS_ID in tokens:
        return {EOS_ID}
    said = b"".join(tokenizer.token_bytes(t) for t in tokens)
    ids = {v for v in range(2, num_valid) if any(w.encode().startswith(said + _bytes(tokenizer, v)) for w in language)}
    return ids | ({EOS_ID} if said.decode(errors="replace") in language else set())


def is_forced(language: Sequence[str], tokenizer: Tokenizer, tokens: Sequence[int]) -> bool:
    """Whether all answers go on with the same byte: there only the tokenizer's own spelling is asked for."""
    said = b"".join(tokenizer.token_bytes(t) for t in tokens)
    texts = [word.encode() for word in language]
    return len({text[len(said) :][:1] for text in texts if text.startswith(said)}) == 1


@functools.cache
def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.token_bytes(token)


def random_language(chance: random.Random) -> list[str]:
    letters = chance.choice(["ab1", 'a"{}', "é12ab", "tru e,"])
    return ["".join(chance.choices(letters, k=chance.randint(1, 6))) for _ in range(chance.randint(1, 6))]


@pytest.mark.parametrize("seed", range(40))
def test_each_row_of_a_window_allows_what_continues_its_own_prefix_and_the_state_stays(seed: int) -> None:
    chance = random.Random(seed)
    tokenizer, compiler, language = json_tokenizer(), json_compiler(), random_language(chance)
    num_valid = len(tokenizer.tokens)
    wanted = Wanted(choice=language) if seed % 2 else Wanted(regex="|".join(re.escape(w) for w in language))
    state, committed = compiler.state(wanted), []
    for _ in range(4):
        window: list[int] = []
        for _ in range(chance.randint(0, 6)):
            able = sorted(allowed_by(language, tokenizer, committed + window, num_valid))
            window.append(chance.choice(able) if able and chance.random() < 0.9 else chance.randrange(num_valid))
        masks = state.masks_along(window)
        assert len(masks) == len(window) + 1
        valid = True
        for i, mask_V in enumerate(masks):
            expected = allowed_by(language, tokenizer, committed + window[:i], num_valid)
            after = state.mask_after(window[:i])
            if not valid:
                assert mask_V is None
                continue
            forced = is_forced(language, tokenizer, committed + window[:i])
            assert ids_of(mask_V) == ids_of(after) and (ids_of(mask_V) == expected or forced)
            assert ids_of(mask_V) and ids_of(mask_V) <= expected
            fresh = compiler.state(wanted)
            fresh.accept(committed + window[:i])
            assert ids_of(fresh.mask_after([])) == ids_of(mask_V)
            valid = i == len(window) or window[i] in ids_of(mask_V)
        step = window[:1] if window and window[0] in ids_of(masks[0]) else []
        state.accept(step)
        committed += step
        assert state.num_accepted == len(committed)


def test_a_window_may_end_the_answer_and_go_on_and_be_taken_back() -> None:
    state = json_compiler().state(Wanted(regex="ab?"))
    a, b = spelled("ab")
    masks = state.masks_along([a, EOS_ID, EOS_ID, b])
    assert [ids_of(m) for m in masks[:4]] == [{a, JSON_PIECES.index("ab") + 2}, {b, EOS_ID}, {EOS_ID}, {EOS_ID}]
    assert masks[4] is None and not state.is_complete
    state.accept([a])
    assert state.is_complete and ids_of(state.mask_after([])) == {b, EOS_ID}
    state.accept([EOS_ID, b])  # what was committed behind the end says nothing
    assert ids_of(state.mask_after([])) == ids_of(state.mask_after([EOS_ID])) == {EOS_ID}


def test_any_of_several_end_tokens_ends_an_answer_and_padding_is_never_allowed() -> None:
    tokenizer = Tokenizer(tiny_tokenizer(JSON_PIECES), eos_token_ids=[BOS_ID])
    state = GrammarCompiler(tokenizer, 50).state(Wanted(choice=["1"]))
    assert len(state.masks_along([])[0]) == 50
    assert [ids_of(m) for m in state.masks_along([*spelled("1"), BOS_ID])][1:] == [{EOS_ID, BOS_ID}] * 2


def test_an_answer_that_the_tokenizer_cant_spell_to_its_end_is_cut_short_alike_in_every_window() -> None:
    compiler, prefix = json_compiler(), spelled("ab")
    wanted = Wanted(choice=["ab\u00a9"])  # its first byte is in no token, its second is
    for stop in range(len(prefix) + 1):
        state, window = compiler.state(wanted), list(prefix[stop:])
        state.accept(prefix[:stop])
        for _ in range(3):
            last = state.masks_along(window)[-1]
            assert last is not None and ids_of(last)
            window.append(min(ids_of(last)))
        assert window[-1] == EOS_ID and ids_of(state.masks_along([])[0]) == ids_of(state.mask_after([]))


def test_a_draft_that_knows_none_of_the_allowed_ids_is_left_unmasked() -> None:
    compiler = GrammarCompiler(json_tokenizer(), 20)
    assert compiler.state(Wanted(choice=["1"])).mask_after([]) is not None
    no_end = Tokenizer(tiny_tokenizer(JSON_PIECES))
    no_end.eos_token_ids = (len(JSON_PIECES) + 1,)
    assert GrammarCompiler(no_end, 20).state(Wanted(choice=["zz"])).mask_after([]) is None


def test_the_parser_leaves_blanks_between_jsons_parts_but_not_without_end() -> None:
    state = json_compiler().state(Wanted(json={"type": "array", "items": {"type": "null"}}))
    state.accept(spelled("[" + " \n" * 20))
    blanks = {*spelled(" \n"), JSON_PIECES.index(", ") + 2}
    assert ids_of(state.mask_after([])) and not ids_of(state.mask_after([])) & blanks


# -- sequences of a batch ------------------------------------------------------------------------------------------


def joined(seq_id: int, tokens: list[int], num_prompt: int, params: SamplingParams, stop: Sequence[int] = ()) -> Join:
    return Join(seq_id, tokens, num_prompt, params, False, 1, 0, 4, 100, [0], [0], stop_mask=list(stop))


def test_a_sequence_that_joins_again_stands_where_its_committed_output_ends() -> None:
    grammars = Grammars(json_compiler)
    replica = Replica(Limits("pearl", 64), 16)
    params = SamplingParams(structured_outputs=Wanted(choice=["abc", "abd"]))
    prompt, output = spelled("xyz"), spelled("ab")
    replica.apply(PlanDiff(1, [joined(5, prompt, 3, params), joined(7, prompt + output, 3, params)]))
    first, again = replica.sequences[5], replica.sequences[7]
    assert ids_of(grammars.masked_after(first, first.row(3), []).allowed) == {*spelled("a")}
    assert ids_of(grammars.masked_after(again, again.row(5), []).allowed) == {*spelled("cd")}
    first.tokens += output  # as a verdict commits them
    rows = grammars.masked_window(first, [first.row(5), first.row(6)], spelled("c"))
    assert [ids_of(row.allowed) for row in rows] == [{*spelled("cd")}, {EOS_ID}]
    grammars.drop_absent({7})
    assert list(grammars._states) == [7]


def test_where_min_tokens_leaves_nothing_the_grammar_prevails() -> None:
    grammars = Grammars(json_compiler)
    replica = Replica(Limits("pearl", 64), 16)
    params = SamplingParams(min_tokens=4, structured_outputs=Wanted(regex="ab?"))
    replica.apply(PlanDiff(1, [joined(0, spelled("x"), 1, params, stop=[EOS_ID])]))
    sequence = replica.sequences[0]
    rows = grammars.masked_window(sequence, [sequence.row(1 + i) for i in range(3)], spelled("ab"))
    assert [list(row.masked) for row in rows] == [[EOS_ID], [EOS_ID], []]
    assert ids_of(rows[2].allowed) == {EOS_ID}


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "structured_outputs=None is not allowed: exactly one of json, json_object, regex, choice and grammar"),
        ({"json": {}, "regex": "a"}, "exactly one of"),
        ({"json": "{"}, "json='{' is not allowed: a JSON schema"),
        ({"json": "[1]"}, "a JSON schema"),
        ({"json": {"a": {1, 2}}}, "a JSON schema"),
        ({"json": {"a": math.nan}}, "a JSON schema"),
        ({"json_object": 1}, "True or False"),
        ({"regex": ""}, "non-empty regular expression"),
        ({"regex": "\ud800"}, "non-empty regular expression"),
        ({"choice": []}, "non-empty strings"),
        ({"choice": "ab"}, "non-empty strings"),
        ({"choice": ["a", ""]}, "non-empty strings"),
        ({"choice": ["a"] * 9999 + [1]}, "non-empty strings"),
    ],
)
def test_bad_fields_are_refused_in_one_short_line(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        Wanted(**fields)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted(regex="(a"), r"regex='\(a' is not allowed: unclosed group"),
        (Wanted(regex="a(?=b)"), "look-around"),
        (Wanted(regex=r"(a)\1"), "backreferences are not supported"),
        (Wanted(regex=r"[^\s\S]"), "no text of the model's tokens matches it"),
        (Wanted(regex="ñ" * 2000 + "("), "unclosed group"),
        (Wanted(regex="😀"), "no text of the model's tokens matches it"),
        (Wanted(json={"type": "strin"}), "Invalid type: strin"),
        (Wanted(json={"type": "integer", "minimum": 3, "maximum": 1}), "Unsatisfiable schema"),
        (Wanted(json={"properties": {"a": {"not": {}}}}), "Unimplemented keys"),
        (Wanted(json={"$ref": "http://nowhere/schema"}), "not present in a registry"),
        (Wanted(json={"enum": ["\ud800"]}), "hex escape"),
    ],
)
def test_what_cant_be_followed_is_refused_in_one_short_line(wanted: Wanted, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        json_compiler().check(wanted)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_model_without_an_end_of_text_token_is_refused() -> None:
    tokenizer = Tokenizer(tiny_tokenizer(JSON_PIECES))
    tokenizer.eos_token_ids = ()
    with pytest.raises(ConfigError, match="end-of-text"):
        GrammarCompiler(tokenizer, 60).check(Wanted(json_object=True))


def test_params_hold_the_schema_as_text_and_travel_in_a_message() -> None:
    schema = {"type": "object", "properties": {"é": {"type": "integer"}}}
    for wanted in (Wanted(json=schema), Wanted(json_object=True), Wanted(regex="a"), Wanted(choice=["a", "b"])):
        diff = PlanDiff(1, [joined(0, [1], 1, SamplingParams(structured_outputs=wanted))])
        assert decode(encode(diff)) == diff
        assert hash(wanted) == hash(replace(wanted))
    assert json.loads(Wanted(json=schema).json) == schema == json.loads(Wanted(json=json.dumps(schema)).json)
    with pytest.raises(ConfigError, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"})
