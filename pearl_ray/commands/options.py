"""The options that commands share, and what is made of them. Knows click and the config; starts nothing.

Each option is also an environment variable ``PEARL_…`` and a key of ``--config FILE.yaml``. The command line wins over
the environment, that over the file, and that over the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import yaml
from click.core import ParameterSource

from pearl_ray.config import (
    ALIASES,
    ATTENTION_BACKENDS,
    BRIDGES,
    DEVICES,
    DTYPES,
    FIELDS,
    MODES,
    VERIFICATIONS,
    PearlConfig,
)
from pearl_ray.core.params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable

F = TypeVar("F", bound=Callable[..., Any])
DEFAULTS = PearlConfig()
_CONFIG_FIELDS = frozenset(FIELDS)
DEBUG_KEY = "pearl_ray.debug"


class AutoOr(click.ParamType):  # type: ignore[type-arg]
    """``auto``, or a number of the given kind."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind
        self.name = f"auto|{'n' if kind is int else 'x'}"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | float | str:
        if value == "auto" or isinstance(value, self.kind):
            return value
        try:
            return self.kind(str(value))
        except ValueError:
            what = "a whole number" if self.kind is int else "a number"
            self.fail(f"{value!r} is neither 'auto' nor {what}.", param, ctx)


def option(*declarations: str, **settings: Any) -> Callable[[F], F]:  # noqa: ANN401 - handed on to click
    """A click option that is also ``PEARL_…`` in the environment, under each long name, and shows its default."""
    longs = [d.split("/")[0] for d in declarations if d.startswith("--")]
    names = [f"PEARL_{long.lstrip('-').replace('-', '_').upper()}" for long in longs]
    settings.setdefault("show_default", True)
    return click.option(*declarations, envvar=names, show_envvar=True, **settings)


def _remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG_KEY] = True
        logging.basicConfig()
        logging.getLogger("pearl_ray").setLevel(logging.DEBUG)


def debug_option() -> Callable[[F], F]:
    """``--debug``; read by the group when a command fails."""
    text = "Show tracebacks and debug logs."
    return option("--debug", is_flag=True, is_eager=True, expose_value=False, callback=_remember_debug, help=text)


def config_option() -> Callable[[F], F]:
    """``--config FILE.yaml``: defaults for the other options of the command."""
    return option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="YAML file with values for these options, written with or without dashes (target-tp: 7).",
    )


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} is not YAML: {error}", ctx, param) from None
    if not isinstance(content, dict):
        raise click.BadParameter(f"{path} must hold a mapping of option names to values.", ctx, param)
    known = [p.name for p in ctx.command.params if isinstance(p, click.Option) and p.expose_value and p.name]
    defaults: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).strip().lstrip("-").replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *ALIASES], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}."
            raise click.BadParameter(f"{path}: no such option {key!r}; {hint}", ctx, param)
        if name in defaults:
            raise click.BadParameter(f"{path}: {key!r} is given twice.", ctx, param)
        if value is not None:
            defaults[name] = value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _refuse_without_parent(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A file that could not be written at the end is refused at the start."""
    if value is not None and not Path(value).resolve().parent.is_dir():
        raise click.BadParameter(f"there is no directory {Path(value).parent}.", ctx, param)
    return value


_MODEL = "Directory with safetensors, .gguf file, or Hub name.  [default: the embedded SmolLM2-135M {}]"

ENGINE_OPTIONS: list[Callable[[Any], Any]] = [
    config_option(),
    option("--target-model", help=_MODEL.format("target")),
    option("--draft-model", help=_MODEL.format("draft")),
    option(
        "--target-tp",
        "--target-tensor-parallel-size",
        "target_tensor_parallel_size",
        type=int,
        default=DEFAULTS.target_tensor_parallel_size,
        help="Shards of the target: GPUs, or processes on CPU.",
    ),
    option(
        "--draft-tp",
        "--draft-tensor-parallel-size",
        "draft_tensor_parallel_size",
        type=int,
        default=DEFAULTS.draft_tensor_parallel_size,
        help="Shards of the draft.",
    ),
    option(
        "--mode",
        type=click.Choice(MODES),
        default=DEFAULTS.mode,
        help="pearl: draft and target at the same time; sd: in turn; ar: the target alone.",
    ),
    option(
        "--verification",
        type=click.Choice(VERIFICATIONS),
        default=DEFAULTS.verification,
        help="Rule by which a drafted token is accepted; both keep the target's distribution.",
    ),
    option(
        "--num-speculative-tokens",
        type=AutoOr(int),
        default=DEFAULTS.num_speculative_tokens,
        help="Tokens the draft makes per round, 1 to 64; auto: from measured step times.",
    ),
    option(
        "--dtype",
        type=click.Choice(DTYPES),
        default=DEFAULTS.dtype,
        help="Of weights and cache; auto: the checkpoint's on GPUs, float32 on CPU.",
    ),
    option("--device", type=click.Choice(DEVICES), default=DEFAULTS.device, help="auto: cuda if there is a GPU."),
    option("--max-model-len", type=int, help="Longest prompt + output, in tokens.  [default: what the models allow]"),
    option("--max-num-seqs", type=int, default=DEFAULTS.max_num_seqs, help="Sequences decoded together."),
    option(
        "--max-num-batched-tokens",
        type=int,
        default=DEFAULTS.max_num_batched_tokens,
        help="Most tokens of one target forward; at least --max-num-seqs.",
    ),
    option(
        "--min-decode-share",
        type=float,
        default=DEFAULTS.min_decode_share,
        help="Part of their speed that running requests keep while long prompts are prefilled, from 0 (prompts as fast "
        "as they go) to below 1.",
    ),
    option(
        "--gpu-memory-utilization",
        type=float,
        default=DEFAULTS.gpu_memory_utilization,
        help="Fraction of each GPU's memory to use, above 0 and up to 1.",
    ),
    option("--block-size", type=int, default=DEFAULTS.block_size, help="Tokens per cache block, 1 to 256."),
    option("--kv-cache-blocks", type=int, help="Cache blocks per model.  [default: as many as the memory holds]"),
    option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        default=DEFAULTS.enable_prefix_caching,
        help="Share the cache blocks of equal prefixes.",
    ),
    option("--seed", type=int, help="Makes the requests without a seed repeatable.  [default: system entropy]"),
    option(
        "--attention-backend",
        type=click.Choice(ATTENTION_BACKENDS),
        default=DEFAULTS.attention_backend,
        help="auto: flash-attn if installed, else triton, on GPUs; torch on CPU.",
    ),
    option("--enforce-eager", is_flag=True, default=DEFAULTS.enforce_eager, help="Don't use CUDA graphs."),
    option("--max-waiting-requests", type=int, help="Bound of the waiting queue, in requests.  [default: unbounded]"),
    option(
        "--round-timeout-s",
        type=float,
        default=DEFAULTS.round_timeout_s,
        help="Seconds that a shard waits for a peer before the round counts as hung.",
    ),
    option(
        "--cpus-per-shard",
        type=AutoOr(float),
        default=DEFAULTS.cpus_per_shard,
        help="CPUs each shard asks Ray for; auto: 1, or an equal part where there are fewer.",
    ),
    option(
        "--ray-address",
        help="host:port of a Ray cluster; local: always start an own one."
        "  [default: join the Ray that runs here, or start one]",
    ),
    option(
        "--trace",
        type=click.Path(dir_okay=False, writable=True),
        callback=_refuse_without_parent,
        help="Write a Chrome trace (JSON) of the newest rounds to this file, at the end.",
    ),
    option("--colocate", is_flag=True, default=DEFAULTS.colocate, help="Draft and target share their GPUs."),
    option(
        "--deterministic",
        is_flag=True,
        default=DEFAULTS.deterministic,
        help="A token's bits don't depend on what else is in the batch (slower).",
    ),
    option(
        "--bridge",
        type=click.Choice(BRIDGES),
        default=DEFAULTS.bridge,
        help="What carries tokens between draft and target; auto: what measures fastest at start.",
    ),
]

_SAMPLING = SamplingParams()


def sampling_options(*, max_tokens: int, temperature: float) -> list[Callable[[Any], Any]]:
    """What a request may ask for, with this command's own defaults."""
    return [
        option("--max-tokens", type=int, default=max_tokens, help="Longest output, in tokens."),
        option("--temperature", type=float, default=temperature, help="0 is greedy."),
        option(
            "--top-p", type=float, default=_SAMPLING.top_p, help="Keep the likeliest tokens up to this probability."
        ),
        option("--top-k", type=int, default=_SAMPLING.top_k, help="Keep that many likeliest tokens; 0: all."),
        option("--min-p", type=float, default=_SAMPLING.min_p, help="Drop tokens below this part of the likeliest's."),
        option(
            "--request-seed",
            type=click.IntRange(-(2**63), 2**64 - 1),
            help="Seed of the request; the same text each time.",
        ),
        option("--stop", multiple=True, help="End at this text; may be given several times."),
        option("--ignore-eos", is_flag=True, help="Go on behind the end-of-sequence token."),
        option("--presence-penalty", type=float, default=_SAMPLING.presence_penalty, help="-2 to 2."),
        option("--frequency-penalty", type=float, default=_SAMPLING.frequency_penalty, help="-2 to 2."),
        option("--repetition-penalty", type=float, default=_SAMPLING.repetition_penalty, help="Above 0; 1: none."),
    ]


def apply(options: Iterable[Callable[[Any], Any]]) -> Callable[[F], F]:
    """Several option decorators as one, shown in the order given."""

    def decorate(function: F) -> F:
        for add in reversed(list(options)):
            function = add(function)
        return function

    return decorate


def take_config(values: dict[str, Any]) -> PearlConfig:
    """Move the engine's options out of a command's values; raises ``ConfigError``."""
    return PearlConfig(**{name: values.pop(name) for name in _CONFIG_FIELDS})


def take_sampling(values: dict[str, Any]) -> SamplingParams:
    """Move the sampling options out of a command's values; raises ``ConfigError``."""
    names = {f.name for f in dataclasses.fields(SamplingParams)} - _CONFIG_FIELDS
    taken = {name: values.pop(name) for name in list(values) if name in names}
    return SamplingParams(seed=values.pop("request_seed"), **taken)


def refuse_engine_options(ctx: click.Context, reason: str) -> None:
    """Raise ``UsageError`` if an engine option was typed; ``reason`` says why it would be ignored."""
    for parameter in ctx.command.params:
        if (
            parameter.name in _CONFIG_FIELDS - {"ray_address"}
            and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        ):
            raise click.UsageError(f"{parameter.opts[0]} {reason}", ctx)


def option_of(field: str) -> str | None:
    """The option that sets a field of ``PearlConfig`` or ``SamplingParams``; None where there is none."""
    return _OPTIONS.get(field)


def _options() -> Mapping[str, str]:
    def holder() -> None: ...

    every = [*ENGINE_OPTIONS, *sampling_options(max_tokens=1, temperature=0.0)]
    parameters = click.command()(apply(every)(holder)).params
    return {p.name: p.opts[0] for p in parameters if p.name and p.expose_value} | {"n": "--n"}


_OPTIONS = _options()
