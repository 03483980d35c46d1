"""Text to tokens and back, and chat templates: Hugging Face's tokenizers, from a directory or a GGUF's metadata.

Knows files and Transformers' tokenizer classes; no weights, no requests. Of GGUF's tokenizers the byte-level BPE ones
are built (``tokenizer.ggml.pre`` in ``PRE_TOKENIZERS``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from pearl_ray.core.errors import ModelLoadError, RequestRefusedError, UnsupportedModelError
from pearl_ray.model.gguf_file import GGUFFile
from pearl_ray.model.gguf_source import FROM_TARGET_KEY, eos_token_ids
from pearl_ray.model.safetensors_source import generation_eos, read_json
from pearl_ray.model.source import local_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2_SPLIT = rf"{_WORDS}|\p{{N}}|{_REST}"
PRE_TOKENIZERS = ("smollm", "llama-bpe", "qwen2", "gpt-2", "default")

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # tokenizer.ggml.token_type
_DIRECT_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # tokenizer.json says all about these


class Tokenizer:
    """One model's tokenizer and chat template.

    Attributes:
        vocab_size: one more than the highest token id; a model's own vocabulary may be padded beyond it.
        eos_token_ids: tokens that end an answer: the tokenizer's, and those of the generation config or metadata.
        bos_token_id: or None.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eos_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.eos_token_id
        ids = [*eos_token_ids, *([own] if isinstance(own, int) else [])]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ids))
        self.bos_token_id: int | None = cast("int | None", tokenizer.bos_token_id)

    @property
    def hugging_face(self) -> PreTrainedTokenizerFast:
        """The tokenizer underneath."""
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @cached_property
    def tokens(self) -> Sequence[str | None]:
        """Each id's token in the tokenizer's own spelling; None for an id that isn't in use."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, token_id in vocabulary.items():
            tokens[token_id] = token
        return tokens

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; ``add_special_tokens``: with the beginning-of-text token, for models that have one.

        A chat prompt has its special tokens in the text already: encode it with False.
        """
        return cast("list[int]", self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text, with U+FFFD for bytes that aren't a character; ids that aren't in use decode to nothing."""
        backend = self._tokenizer.backend_tokenizer
        return backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for (part of a character, at times); empty for an id not in use."""
        token = self.tokens[token_id] if 0 <= token_id < self.vocab_size else None
        if token is None:
            return b""
        if token_id not in self._added and self._is_byte_level:
            return bytes(_BYTE_OF[c] for c in token)
        if token_id not in self._added and len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_args: Any,  # noqa: ANN401 - whatever the model's template knows
    ) -> str:
        """The conversation as the prompt text that the model was trained on; encode it without special tokens.

        Raises:
            RequestRefusedError: the model has no template, or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise RequestRefusedError("the model has no chat template; send a prompt instead of messages")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(t) for t in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **template_args,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:  # a template is the model's code
            raise RequestRefusedError(f"the model's chat template refuses the messages: {error}") from error
        return cast("str", text)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)

    @cached_property
    def _is_byte_level(self) -> bool:
        return type(self._tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel" or all(
            c in _BYTE_OF for i, t in enumerate(self.tokens) if t is not None and i not in self._added for c in t
        )


def load_tokenizer(path_or_name: str | Path, *, offline: bool = False) -> Tokenizer:
    """A model's tokenizer: of a Hugging Face directory, a ``.gguf`` file, or a Hub name when online.

    Raises:
        ModelLoadError: there is no usable tokenizer there.
        UnsupportedModelError: a GGUF tokenizer of another kind than byte-level BPE.
    """
    path = local_path(path_or_name, offline=offline)
    return _from_directory(path) if path.is_dir() else _from_gguf(GGUFFile(path))


def takes_vocabulary_from_target(path_or_name: str | Path, *, offline: bool = False) -> bool:
    """Whether this is a draft without a vocabulary of its own: its target's tokenizer is the one to load."""
    path = local_path(path_or_name, offline=offline)
    return path.is_file() and FROM_TARGET_KEY in GGUFFile(path).metadata


def _from_directory(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = path / "tokenizer_config.json"
    kind = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    direct = kind in _DIRECT_CLASSES and (path / "tokenizer.json").is_file()  # spares AutoTokenizer's 2 s of imports
    loader = PreTrainedTokenizerFast if direct else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(f"{path}: its tokenizer can't be loaded ({reason})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModelError(f"{path}: {kind} has no fast tokenizer; supported: models with a tokenizer.json")
    return Tokenizer(tokenizer, generation_eos(path))


def _from_gguf(file: GGUFFile) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    if FROM_TARGET_KEY in file.metadata:
        raise ModelLoadError(f"{file.path}: this draft has its target's vocabulary; load the target's tokenizer")
    pre = _pre_tokenizer_kind(file)
    tokens, merges, types = (_array(file, key) for key in ("tokens", "merges", "token_type"))
    vocabulary = {t: i for i, (t, type_) in enumerate(zip(tokens, types, strict=True)) if type_ != _UNUSED}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = Backend(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    _add_special_tokens(backend, tokens, types)
    if pre == "qwen2":
        from tokenizers import normalizers

        backend.normalizer = normalizers.NFC()
    special = {name: _special(file, tokens, key) for name, key in _SPECIAL_KEYS.items()}
    add_bos = file.metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    if add_bos and special["bos_token"] is not None:
        _prepend(backend, special["bos_token"], vocabulary)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        **{name: token for name, token in special.items() if token is not None},
    )
    return Tokenizer(tokenizer, eos_token_ids(file))


_SPECIAL_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _pre_tokenizer_kind(file: GGUFFile) -> str:
    kind, pre = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{file.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; supported: 'gpt2' with "
            f"{', '.join(PRE_TOKENIZERS)}; or pass the Hugging Face directory"
        )
    return str(pre)


def _array(file: GGUFFile, key: str) -> list[Any]:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if value is None or isinstance(value, (str, int, float)):
        raise ModelLoadError(f"{file.path}: tokenizer.ggml.{key} is missing")
    return value if isinstance(value, list) else value.tolist()


def _special(file: GGUFFile, tokens: Sequence[str], key: str) -> str | None:
    token_id = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return tokens[token_id] if isinstance(token_id, int) and token_id < len(tokens) else None


def _pre_tokenizer(kind: str) -> PreTokenizer:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if kind == "smollm":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    if kind in ("gpt-2", "default"):
        return ByteLevel(add_prefix_space=False, use_regex=True)
    pattern = Regex(_LLAMA3_SPLIT if kind == "llama-bpe" else _QWEN2_SPLIT)
    return Sequence([Split(pattern, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def _add_special_tokens(backend: Backend, tokens: Sequence[str], types: Sequence[int]) -> None:
    from tokenizers import AddedToken

    by_type = {kind: [t for t, type_ in zip(tokens, types, strict=True) if type_ == kind] for kind in set(types)}
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in by_type.get(_CONTROL, [])])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in by_type.get(_USER_DEFINED, [])])


def _prepend(backend: Backend, bos: str, vocabulary: Mapping[str, int]) -> None:
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, vocabulary[bos])]
    )


def _bytes_of_characters() -> Mapping[str, int]:
    """GPT-2's one printable character per byte: printable Latin-1 stands for itself, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _bytes_of_characters()
