"""Tokenizers from directories and from GGUF metadata, chat templates, and whether two vocabularies are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from pearl_ray.core.detokenizer import Detokenizer
from pearl_ray.core.errors import (
    ModelLoadError,
    RequestRefusedError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from pearl_ray.model.gguf_source import FROM_TARGET_KEY
from pearl_ray.model.tokenizer import Tokenizer, load_tokenizer, takes_vocabulary_from_target
from pearl_ray.model.vocabulary import check_vocabularies

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
EXTRA = "<tool_call>"
TEXT = ["The year 1234 was good, wasn't it?\n\n  def f(x):\n    return x + 56789 # naïve über 你好 😀\r\n"] * 4
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    """What the published tokenizer.json of each kind says."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("smollm", "gpt-2"))
    if pre == "gpt-2":
        return byte_level
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    split = pre_tokenizers.Split(Regex(LLAMA3 if pre == "llama-bpe" else QWEN2), "isolated")
    return pre_tokenizers.Sequence([split, byte_level])


def trained(pre: str) -> Backend:
    """A small byte-level BPE of that kind; special tokens first, a user-defined one last."""
    backend = Backend(models.BPE(ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_tokens([AddedToken(EXTRA, normalized=False)])
    return backend


def write_gguf(path: Path, backend: Backend, pre: str, **changes: object) -> Path:
    """The tokenizer as llama.cpp's converter writes it, padded with two unused tokens."""
    model = json.loads(backend.to_str())["model"]
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    types = [3 if t in SPECIAL else 4 if t == EXTRA else 1 for t in tokens]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(str(changes.get("model", "gpt2")))
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, "[PAD1]", "[PAD2]"])
    writer.add_token_types([*types, 5, 5])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_bos_token_id(1)
    if "add_bos" in changes:
        writer.add_add_bos_token(bool(changes["add_bos"]))
    if changes.get("template", True):
        writer.add_chat_template(TEMPLATE)
    if "from_target" in changes:
        writer.add_array(FROM_TARGET_KEY, ["token_embd.weight"])
    writer.add_tensor("t", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_directory(path: Path, backend: Backend, config: Mapping[str, object] | None = None) -> Path:
    """The tokenizer as a Hugging Face directory."""
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    settings |= {"chat_template": TEMPLATE, "clean_up_tokenization_spaces": False} | dict(config or {})
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module", params=["smollm", "llama-bpe", "qwen2", "gpt-2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """The same tokenizer, from GGUF and from a directory."""
    folder, backend = tmp_path_factory.mktemp("pair"), trained(request.param)
    from_gguf = load_tokenizer(write_gguf(folder / "t.gguf", backend, request.param, add_bos=False))
    return from_gguf, load_tokenizer(write_directory(folder / "hf", backend))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("t") / "t.gguf", trained("smollm"), "smollm"))


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab 12345\n\r\t'sdT.,é你😀e\u0301<", max_size=40) | st.sampled_from(TEXT))
def test_a_gguf_tokenizer_encodes_as_the_directorys(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    from_gguf, from_directory = pair
    ids = from_gguf.encode(text)
    assert ids == from_directory.encode(text)
    assert from_gguf.decode(ids) == from_directory.decode(ids)
    assert b"".join(map(from_gguf.token_bytes, ids)).decode() == from_gguf.decode(ids)


def test_special_and_user_defined_tokens_are_single_tokens(pair: tuple[Tokenizer, Tokenizer]) -> None:
    for tokenizer in pair:
        ids = tokenizer.encode(f"<|im_start|>a{EXTRA}<|im_end|>", add_special_tokens=False)
        assert [tokenizer.tokens[i] for i in ids] == ["<|im_start|>", "a", EXTRA, "<|im_end|>"]
        assert tokenizer.decode(ids) == f"a{EXTRA}"
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"<|im_start|>a{EXTRA}<|im_end|>"
        assert tokenizer.token_bytes(ids[0]) == b"<|im_start|>"
    assert list(pair[0].tokens) == list(pair[1].tokens)


def test_padding_of_the_vocabulary_is_no_token(tokenizer: Tokenizer) -> None:
    num = trained("smollm").get_vocab_size()
    assert tokenizer.vocab_size == num
    assert tokenizer.decode([num, num + 1]) == "" and tokenizer.token_bytes(num) == b""


def test_tokens_that_end_an_answer_come_from_the_metadata_or_the_generation_config(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert tokenizer.eos_token_ids == (2, 0) and tokenizer.bos_token_id == 1
    folder = write_directory(tmp_path / "hf", trained("smollm"))
    assert load_tokenizer(folder).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert load_tokenizer(folder).eos_token_ids == (0, 2)


@pytest.mark.parametrize(("pre", "flag", "expected"), [("llama-bpe", None, True), ("qwen2", None, False)])
@pytest.mark.parametrize("override", [None, True, False])
def test_the_first_token_is_added_where_the_file_or_its_kind_says_so(
    tmp_path: Path, pre: str, flag: None, expected: bool, override: bool | None
) -> None:
    changes = {} if override is None else {"add_bos": override}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", trained(pre), pre, **changes))
    assert (tokenizer.encode("a")[0] == 1) == (expected if override is None else override)
    assert tokenizer.encode("a", add_special_tokens=False)[0] != 1


def test_the_chat_template_makes_the_prompt(pair: tuple[Tokenizer, Tokenizer]) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for tokenizer in pair:
        prompt = tokenizer.apply_chat_template(messages)
        assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=False).endswith("<|im_end|>\n")
        assert tokenizer.decode(tokenizer.encode(prompt, False), skip_special_tokens=False) == prompt


def test_a_template_that_refuses_or_is_missing_is_an_error_of_the_request(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(RequestRefusedError, match="no tools here"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])
    plain = load_tokenizer(write_gguf(tmp_path / "t.gguf", trained("smollm"), "smollm", template=False))
    assert not plain.has_chat_template
    with pytest.raises(RequestRefusedError, match="no chat template"):
        plain.apply_chat_template([{"role": "user", "content": ""}])


@pytest.mark.parametrize("changes", [{"model": "llama"}, {"pre": "deepseek-llm"}])
def test_another_kind_of_gguf_tokenizer_is_refused_by_name(tmp_path: Path, changes: dict[str, str]) -> None:
    path = write_gguf(tmp_path / "t.gguf", trained("gpt-2"), changes.pop("pre", "smollm"), **changes)
    with pytest.raises(UnsupportedModelError, match=r"'llama' with|'deepseek-llm'"):
        load_tokenizer(path)


def test_a_directory_without_a_tokenizer_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="tokenizer can't be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_corrupt_tokenizer_file_is_an_error_that_names_the_directory(tmp_path: Path) -> None:
    folder = write_directory(tmp_path / "hf", trained("smollm"))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(ModelLoadError, match="hf: its tokenizer can't be loaded"):
        load_tokenizer(folder)


def test_a_draft_without_a_vocabulary_says_that_it_has_its_targets(tmp_path: Path) -> None:
    own = write_gguf(tmp_path / "a.gguf", trained("smollm"), "smollm")
    path = write_gguf(tmp_path / "b.gguf", trained("smollm"), "smollm", from_target=True)
    assert takes_vocabulary_from_target(path) and not takes_vocabulary_from_target(own)
    assert not takes_vocabulary_from_target(tmp_path)
    with pytest.raises(ModelLoadError, match="target's vocabulary"):
        load_tokenizer(path)


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 300), max_size=60))
def test_incremental_text_is_the_tokenizers_own(tokenizer: Tokenizer, ids: list[int]) -> None:
    prompt = tokenizer.encode("Once ")
    detokenizer = Detokenizer(tokenizer.decode, prompt)
    text = "".join(detokenizer.append([i]).text for i in ids) + detokenizer.finish()
    assert text == tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab é你😀", max_size=50))
def test_incremental_text_of_a_sentencepiece_decoder_with_byte_fallback_is_its_own(text: str) -> None:
    pieces = ["a", "b", "\u2581", "\u2581a", *(f"<0x{b:02X}>" for b in range(256))]
    backend = Backend(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    words = text.replace(" a", "\u2581a").replace(" ", "\u2581")
    ids: list[int] = []
    for character in words.replace("\u2581a", "A"):
        piece = {"A": "\u2581a"}.get(character, character)
        ids += [pieces.index(piece)] if piece in pieces else [4 + b for b in piece.encode()]
    detokenizer = Detokenizer(lambda some: backend.decode(some), [0])
    released = "".join(detokenizer.append([i]).text for i in ids) + detokenizer.finish()
    assert released == text


class Tokens:
    """As much of a tokenizer as is compared."""

    def __init__(self, tokens: Sequence[str | None]) -> None:
        self.tokens = tokens


def test_models_padded_differently_share_their_tokenizers_ids() -> None:
    same = Tokens(["a", "b", "c"])
    assert check_vocabularies(same, same, target_vocab_size=8, draft_vocab_size=4) == 3
    fewer = Tokens(["a", "b"])
    assert check_vocabularies(same, fewer, target_vocab_size=8, draft_vocab_size=4) == 2
    assert check_vocabularies(fewer, same, target_vocab_size=2, draft_vocab_size=4) == 2
    hole = Tokens(["a", None, "c"])
    assert check_vocabularies(same, hole, target_vocab_size=3, draft_vocab_size=3) == 3


def test_the_first_token_that_differs_is_named() -> None:
    with pytest.raises(VocabularyMismatchError, match="token 1 is 'b' in the target and 'x' in the draft"):
        check_vocabularies(Tokens(["a", "b", "c"]), Tokens(["a", "x", "y"]), target_vocab_size=3, draft_vocab_size=3)


def test_a_draft_that_cannot_read_the_targets_last_tokens_is_refused() -> None:
    with pytest.raises(VocabularyMismatchError, match=r"token 2 \('c'\) is beyond the draft's vocabulary of 2"):
        check_vocabularies(Tokens(["a", "b", "c"]), Tokens(["a", "b"]), target_vocab_size=3, draft_vocab_size=2)
