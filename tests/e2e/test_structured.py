"""Structured output through the whole engine: random schemas, regexes, choices on a tiny pair that can spell JSON."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from pearl_ray.core.errors import ConfigError
from pearl_ray.core.params import SamplingParams, StructuredOutputsParams
from pearl_ray.core.requests import Request
from tests.local_engine import LocalEngine
from tests.tiny import EOS_ID, JSON_PIECES, tiny_pair

pytestmark = pytest.mark.timeout(1200)  # minutes on a loaded machine

Wanted = StructuredOutputsParams
Dirs = tuple[Path, Path]
COUNT = 100  # per kind
QUOTE, CLOSE, COLON = (JSON_PIECES.index(piece) + 2 for piece in ('"', "}", '":'))


@pytest.fixture(scope="module")
def dirs(tmp_path_factory: pytest.TempPathFactory) -> Dirs:
    """128 ids, of which the tokenizer has 116: some of them are padding."""
    return tiny_pair(tmp_path_factory.mktemp("json"), vocab_size=128, pieces=JSON_PIECES)


def random_schema(chance: random.Random, depth: int = 0) -> dict[str, object]:
    leaves = ["string", "pattern", "format", "integer", "number", "boolean", "null", "enum", "const"]
    kind = chance.choice(leaves + ["object", "array", "anyOf", "object", "tuple", "ref"] * (depth < 2))
    low = chance.randint(0, 2)
    match kind:
        case "string":
            return {"type": "string", "minLength": low, "maxLength": low + chance.randint(0, 4)}
        case "pattern":
            patterns = ["^[a-c]{1,4}$", "^x+y?$", "^(ab|12)*z$", "^é?[^a-z]$"]
            return {"type": "string", "pattern": chance.choice(patterns), "maxLength": 8}
        case "format":
            return {"type": "string", "format": chance.choice(["date", "time", "ipv4"])}
        case "integer":
            least = chance.randint(-20, 20)
            return {"type": "integer", "minimum": least, "maximum": least + chance.randint(0, 300)}
        case "number":
            return {"type": "number", "exclusiveMinimum": -low, "maximum": chance.randint(1, 9)}
        case "boolean" | "null":
            return {"type": kind}
        case "enum":
            values = [1, "ab", 'a"b', None, [1, 2], {"k": "é"}, -2.5, "\n", {}]
            return {"enum": chance.sample(values, chance.randint(1, 3))}
        case "const":
            return {"const": chance.choice(["x", 12, "a b", False])}
        case "array":
            items = random_schema(chance, depth + 1)
            return {"type": "array", "items": items, "minItems": low, "maxItems": low + chance.randint(0, 2)}
        case "tuple":
            parts = [random_schema(chance, depth + 1) for _ in range(max(low, 1))]
            return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
        case "anyOf":
            return {"anyOf": [random_schema(chance, depth + 1) for _ in range(2)]}
        case "ref":
            node = {"type": "object", "properties": {"n": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}}
            node |= {"required": ["n"], "additionalProperties": False}
            return {"$ref": "#/$defs/n", "$defs": {"n": node}} if depth == 0 else {"type": "null"}
    names = chance.sample(["a", "b", "name", "12", "x y", 'q"'], chance.randint(0, 3))
    return {
        "type": "object",
        "properties": {name: random_schema(chance, depth + 1) for name in names},
        "required": names[: chance.randint(0, len(names))],
        "additionalProperties": False,
    }


def random_regex(chance: random.Random, depth: int = 0) -> str:
    atoms = ["a", "é", "[a-f0-9]", "12", r"\d", r"\.", "[^a-z]", '"', "true", " ", r"\n", "(?:ab|12)"]
    parts = []
    for _ in range(chance.randint(1, 3)):
        atom = chance.choice(atoms) if depth == 2 or chance.random() < 0.6 else f"({random_regex(chance, depth + 1)})"
        parts.append(atom + chance.choice(["", "", "?", "{1,3}", "{2}", "*" if depth == 0 else "?"]))
    return "".join(parts) + (f"|{chance.choice(atoms)}" if chance.random() < 0.3 else "")


def random_choice(chance: random.Random) -> list[str]:
    letters = chance.choice(["ab12", 'a"{}:\n', "é 1x", "true"])
    return ["".join(chance.choices(letters, k=chance.randint(1, 8))) for _ in range(chance.randint(1, 5))]


@functools.cache
def requests_of(kind: str) -> list[SamplingParams]:
    """Random grammars, each with sampling settings of its own."""
    chance, found = random.Random(kind), []
    for i in range(COUNT):
        options: dict[str, object] = {"max_tokens": 40}
        if kind == "json":
            wanted = Wanted(json=random_schema(chance))
        elif kind == "json_object":
            wanted = Wanted(json_object=True)
            options = {"max_tokens": 30, "logit_bias": {QUOTE: 6.0, CLOSE: 8.0, COLON: 4.0}}
        else:
            wanted = Wanted(regex=random_regex(chance)) if kind == "regex" else Wanted(choice=random_choice(chance))
        options |= chance.choice([{}, {}, {"top_k": 5}, {"top_p": 0.8}, {"presence_penalty": 0.5}, {"min_tokens": 3}])
        temperature = chance.choice([0.0, 0.7, 1.0, 1.5])
        found.append(SamplingParams(temperature=temperature, seed=i, structured_outputs=wanted, **options))
    return found


def check(wanted: StructuredOutputsParams, text: str) -> None:
    """Raises if the answer isn't of this kind."""
    if wanted.json is not None:
        jsonschema.validate(json.loads(text), json.loads(wanted.json))
    elif wanted.json_object:
        assert isinstance(json.loads(text), dict)
    else:
        assert text in wanted.choice if wanted.choice else re.fullmatch(wanted.regex, text), (wanted, text)


def run(dirs: Dirs, params: list[SamplingParams], **options: object) -> list[Request]:
    with LocalEngine(dirs, **({"max_num_seqs": 64, "num_blocks": 512} | options)) as engine:
        prompts = [engine.models.tokenizer.encode(f"Q{i}:") for i in range(len(params))]
        requests = engine.generate(prompts, params)
        assert all(pool.num_free == pool.num_blocks for pool in engine.pools)
    return requests


def tokens_of(requests: list[Request]) -> list[list[int]]:
    return [request.answers[0].token_ids for request in requests]


def stopped(requests: list[Request]) -> int:
    """How many ended by stop; each of those is checked."""
    count = 0
    for request in requests:
        for answer in request.output().outputs:
            if answer.finish_reason == "stop":
                count += 1
                check(request.params.structured_outputs, answer.text)
    return count


@pytest.fixture(scope="module")
def answered(dirs: Dirs) -> Callable[[str], list[Request]]:
    """Each kind's requests, answered by PEARL with windows of 4, once."""
    return functools.cache(lambda kind: run(dirs, requests_of(kind), window=4))


KINDS = ["json", "json_object", "regex", "choice"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_that_ends_by_stop_is_valid_and_speculation_gains(answered, kind):
    requests = answered(kind)
    assert stopped(requests) >= {"json": 90, "json_object": 25, "regex": 80, "choice": 100}[kind]
    assert len({tuple(tokens) for tokens in tokens_of(requests)}) > COUNT // 4
    answers = [request.answers[0] for request in requests]
    accepted, drafted = (sum(getattr(a, name) for a in answers) for name in ("num_accepted", "num_drafted"))
    assert accepted > 0.35 * drafted  # what is drafted beyond an answer's end counts as drafted


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_answer_without_speculation(dirs, answered, kind):
    assert tokens_of(run(dirs, requests_of(kind), mode="ar")) == tokens_of(answered(kind))


def mixed(count: int) -> list[SamplingParams]:
    """Some requests of each kind in turn."""
    return [requests_of(kind)[i] for i in range(count) for kind in KINDS]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "pearl", "window": 1},
        {"mode": "pearl", "window": 8},
        {"mode": "sd", "window": 1},
        {"mode": "sd", "window": 4},
        {"mode": "sd", "window": 8},
        {"mode": "pearl", "target_tp": 3, "draft_tp": 2},
        {"mode": "pearl", "draft_grammars": False},
        {"mode": "pearl", "num_blocks": 18, "block_size": 4, "max_num_batched_tokens": 16},
    ],
    ids=lambda o: ", ".join(f"{name} {value}" for name, value in o.items()),
)
def test_a_seed_gives_the_same_answer_in_every_mode_window_and_arrangement(dirs, answered, options):
    count = 9 if "target_tp" in options or "num_blocks" in options else 15
    # Two without a grammar in the batch; where blocks are few, they outgrow them together, whatever ends when.
    without = [SamplingParams(temperature=0.8, seed=9 + i, max_tokens=48, ignore_eos=True) for i in range(2)]
    params = without + mixed(count)
    expected = tokens_of(run(dirs, params, mode="ar"))
    with LocalEngine(dirs, **({"max_num_seqs": 64, "num_blocks": 512} | options)) as engine:
        prompts = [engine.models.tokenizer.encode(f"Q{i}:") for i in range(len(params))]
        assert tokens_of(engine.generate(prompts, params)) == expected
        assert ("num_blocks" in options) == (engine.controller.statistics.preemptions > 0)
        assert all(pool.num_free == pool.num_blocks for pool in engine.pools)


@pytest.mark.parametrize("draft_grammars", [True, False])
def test_answers_under_the_rejection_rule_are_valid_and_dont_depend_on_the_window(dirs, draft_grammars):
    texts = []
    for window in (2, 5):
        options = {"verification": "rejection", "window": window, "draft_grammars": draft_grammars}
        requests = run(dirs, mixed(10), **options)
        assert stopped(requests) >= 25
        texts.append(tokens_of(requests))
    assert texts[0] == texts[1]


def test_where_all_is_said_only_the_end_of_the_text_follows(dirs):
    wanted = Wanted(choice=["ab12"])
    params = [
        SamplingParams(temperature=1.0, seed=1, max_tokens=20, structured_outputs=wanted),
        SamplingParams(temperature=1.0, seed=2, max_tokens=9, ignore_eos=True, structured_outputs=wanted),
        SamplingParams(temperature=1.0, seed=3, max_tokens=20, min_tokens=8, structured_outputs=wanted),
        SamplingParams(temperature=1.0, seed=4, max_tokens=2, structured_outputs=wanted),
        SamplingParams(temperature=1.0, seed=5, max_tokens=20, stop="1", structured_outputs=wanted),
    ]
    first, ignoring, at_least, short, cut = (r.output().outputs[0] for r in run(dirs, params))
    assert (first.text, first.finish_reason) == (at_least.text, at_least.finish_reason) == ("ab12", "stop")
    assert first.token_ids[-1] == EOS_ID and at_least.token_ids[-4:] == [EOS_ID] * 4 and len(at_least.token_ids) == 8
    assert ignoring.text == "ab12" and ignoring.finish_reason == "length" and len(ignoring.token_ids) == 9
    assert short.finish_reason == "length" and "ab12".startswith(short.text)
    assert cut.text == "ab" and cut.finish_reason == "stop"


def test_all_of_a_requests_answers_are_valid_and_differ(dirs):
    wanted = Wanted(regex="[a-z]{3,6}")
    params = [SamplingParams(n=5, temperature=1.5, seed=1, max_tokens=12, structured_outputs=wanted)]
    requests = run(dirs, params)
    assert stopped(requests) == 5 and len({answer.text for answer in requests[0].output().outputs}) > 1


def test_a_grammar_that_cant_be_followed_is_refused_when_it_is_submitted(dirs):
    with LocalEngine(dirs) as engine, pytest.raises(ConfigError, match="unclosed group"):
        engine.submit([2], SamplingParams(structured_outputs=Wanted(regex="(a")))


def test_requests_without_a_grammar_never_load_what_grammars_need(dirs, monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError("a compiler was made")

    monkeypatch.setattr("tests.local_engine.GrammarCompiler", refuse)
    run(dirs, [SamplingParams(temperature=0.0, max_tokens=5)])
