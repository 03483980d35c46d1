"""Where a model's weights come from: a directory, a GGUF file, the Hub. Knows files, no layers and no devices.

Every source speaks Hugging Face's tensor names and row order, and reads only the slice it is asked for, so a
tensor-parallel rank never holds more than its own part.

A source of one's own needs no change here: a model called ``package.module:callable:PATH`` is opened by that callable,
as ``callable(Path(PATH), fallback=...) -> WeightSource``, where PATH is a model directory whose ``config.json`` and
tokenizer are read as usual.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch

from pearl_ray.core.errors import ModelLoadError
from pearl_ray.model.config import ModelConfig
from pearl_ray.model.gguf_source import GGUFSource
from pearl_ray.model.safetensors_source import SafetensorsSource

_OWN_SOURCE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):([A-Za-z_]\w*):(.+)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_HUB_IGNORED = ["*/*", "consolidated*"]  # the same weights once more, in other layouts


class WeightSource(Protocol):
    """The tensors of one model, by Hugging Face's names, such as 'model.layers.0.self_attn.q_proj.weight'."""

    config: ModelConfig

    def names(self) -> Collection[str]:
        """All tensors that :meth:`load` knows."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor, rows (output features) first."""

    def stored_bytes(self, name: str) -> int:
        """What the tensor takes up in its file."""

    def load(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        """The tensor, or the part in these rows and columns, contiguous, on the CPU; only that part is read.

        The dtype is the stored one; quantised tensors come as float32.

        Raises:
            ModelLoadError: there is no such tensor, or the file breaks off; names both.
        """


@runtime_checkable
class LoadsInto(Protocol):
    """A source that fills the destination itself, in bounded pieces, without holding the whole part on the host."""

    def load_into(self, name: str, out: torch.Tensor, rows: slice | None = None, cols: slice | None = None) -> None:
        """:meth:`WeightSource.load`, cast to the dtype of ``out`` and written there, whatever its device."""


def load_into(
    source: WeightSource, name: str, out: torch.Tensor, rows: slice | None = None, cols: slice | None = None
) -> None:
    """Fill ``out`` with a part of a tensor: by the source itself where it can, else through a tensor on the host."""
    if isinstance(source, LoadsInto):
        source.load_into(name, out, rows, cols)
    else:
        out.copy_(source.load(name, rows, cols))


def part_shape(shape: tuple[int, ...], rows: slice | None = None, cols: slice | None = None) -> tuple[int, ...]:
    """The shape of those rows and columns of a tensor of that shape."""
    parts = (rows or slice(None), cols or slice(None))[: len(shape)]
    sizes = tuple(len(range(size)[part]) for size, part in zip(shape, parts, strict=False))
    return sizes + shape[len(sizes) :]


def open_source(
    path_or_name: str | Path, *, fallback: WeightSource | None = None, offline: bool = False
) -> WeightSource:
    """Open a model: a directory with safetensors and config.json, a ``.gguf`` file, a Hub name when online, or a
    source of one's own, ``package.module:callable:PATH``.

    Args:
        fallback: the target's source, for a draft whose file leaves tensors (the embedding) to its target.
        offline: take a Hub name from the local cache alone.

    Raises:
        ModelLoadError: a missing, truncated or corrupt file, missing tensors, or a Hub name that can't be fetched.
        UnsupportedModelError: the architecture, an option of it or a tensor type isn't implemented.
    """
    path = local_path(path_or_name, offline=offline)
    source: WeightSource
    opener = _own_opener(path_or_name)
    if opener is not None:
        source = opener(path, fallback=fallback)
    elif path.is_dir():
        source = SafetensorsSource(path)
    else:
        gguf = GGUFSource(path)
        source = _with_target_tensors(gguf, fallback) if gguf.from_target else gguf
    missing = [name for name in expected_names(source.config) if name not in source.names()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelLoadError(f"{path}: lacks tensors {', '.join(missing[:3])}{more}; the checkpoint is incomplete")
    return source


def local_path(path_or_name: str | Path, *, offline: bool = False) -> Path:
    """The model's directory or ``.gguf`` file on this machine, fetched from the Hub where it is a Hub name.

    Raises:
        ModelLoadError: neither a path that exists nor a model that can be fetched; one line that says which.
    """
    own = _own_source(path_or_name)
    if own is not None:
        path_or_name = own[3]
    path = Path(path_or_name).expanduser()
    if path.is_dir() or path.is_file():
        if path.is_file() and path.suffix != ".gguf":
            raise ModelLoadError(f"{path}: neither a directory nor a .gguf file")
        return path
    name = str(path_or_name)
    if path.suffix == ".gguf" or not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise ModelLoadError(f"{name}: no such file or directory, and no Hub name (owner/model) either")
    return _from_hub(name, offline)


def _own_source(path_or_name: str | Path) -> re.Match[str] | None:
    """``module:callable:PATH`` in its parts; a path that exists is a path, colons or not."""
    return None if Path(path_or_name).exists() else _OWN_SOURCE.fullmatch(str(path_or_name))


def _own_opener(path_or_name: str | Path) -> Callable[..., WeightSource] | None:
    own = _own_source(path_or_name)
    if own is None:
        return None
    try:
        return cast("Callable[..., WeightSource]", getattr(importlib.import_module(own[1]), own[2]))
    except (ImportError, AttributeError) as error:
        raise ModelLoadError(
            f"{path_or_name}: {own[1]}:{own[2]} can't be imported ({error}); put its folder on PYTHONPATH"
        ) from error


def _from_hub(name: str, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    # The hub's client is httpx or httpx2, by its version; its own error derives from that client's.
    client_error: type[BaseException] = HfHubHTTPError.__bases__[0]
    try:
        return Path(
            snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED, local_files_only=offline)
        )
    except GatedRepoError as error:
        raise ModelLoadError(f"{name}: accept its licence first: https://huggingface.co/{name}") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(f"{name}: no such directory here, and no such model on the Hub") from error
    except (HfHubHTTPError, client_error, OSError, ValueError) as error:
        raise ModelLoadError(
            f"{name}: no such directory here, not in the Hub's local cache, and the Hub is offline or can't be reached "
            f"({type(error).__name__}); pass a directory or a .gguf file"
        ) from error


def expected_names(config: ModelConfig) -> Iterator[str]:
    """The tensors a model of this config can't do without."""
    yield "model.embed_tokens.weight"
    yield "model.norm.weight"
    if not config.tie_word_embeddings:
        yield "lm_head.weight"
    attention, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight"
        yield f"{prefix}.post_attention_layernorm.weight"
        for name in (*attention, "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight"
        for name in mlp:
            yield f"{prefix}.mlp.{name}.weight"
        biased = [f"self_attn.{n}" for n in attention] if config.qkv_bias else []
        biased += ["self_attn.o_proj"] if config.output_bias else []
        biased += [f"mlp.{n}" for n in mlp] if config.mlp_bias else []
        for name in biased:
            yield f"{prefix}.{name}.bias"
        if config.qk_norm:
            yield f"{prefix}.self_attn.q_norm.weight"
            yield f"{prefix}.self_attn.k_norm.weight"


def file_bytes(source: WeightSource) -> int:
    """Bytes that all of a source's tensors take up as stored."""
    return sum(source.stored_bytes(name) for name in source.names())


def num_parameters(source: WeightSource) -> int:
    """Numbers in all of a source's tensors; times a dtype's item size, what the weights take up in memory."""
    return sum(math.prod(source.shape(name)) for name in source.names())


class _SharingSource:
    """A draft's own tensors, and the ones that it leaves to its target."""

    def __init__(self, own: GGUFSource, target: WeightSource) -> None:
        self.config = own.config
        self._own, self._target = own, target

    def names(self) -> Collection[str]:
        return {*self._own.names(), *self._own.from_target}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home(name).shape(name)

    def stored_bytes(self, name: str) -> int:
        return self._home(name).stored_bytes(name)

    def load(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        return self._home(name).load(name, rows, cols)

    def load_into(self, name: str, out: torch.Tensor, rows: slice | None = None, cols: slice | None = None) -> None:
        load_into(self._home(name), name, out, rows, cols)

    def _home(self, name: str) -> WeightSource:
        return self._target if name in self._own.from_target else self._own


def _with_target_tensors(draft: GGUFSource, target: WeightSource | None) -> WeightSource:
    names = ", ".join(sorted(draft.from_target))
    if target is None:
        raise ModelLoadError(f"{draft.path}: this draft takes {names} from its target model and can't be opened alone")
    wanted = (draft.config.vocab_size, draft.config.hidden_size)
    for name in sorted(draft.from_target):
        found = target.shape(name) if name in target.names() else None
        if found != wanted:
            raise ModelLoadError(
                f"{draft.path}: this draft takes {name} {wanted} from its target model, where it is {found}; "
                "use the target it was made for, or another --draft-model"
            )
    return _SharingSource(draft, target)
