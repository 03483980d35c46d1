"""``pearl-ray bench serve``: load on any OpenAI-compatible server, told in the words of ``vllm bench serve``.

Knows options and what is wrong with them; sending is in ``load``, prompts in ``load_prompts``, figures in
``load_report``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from pearl_ray.commands.console import counting_bar, output_console, progress_console
from pearl_ray.commands.options import config_option, debug_option, option

if TYPE_CHECKING:
    from pearl_ray.commands.load import Target
    from pearl_ray.commands.load_report import Run

CLIENT_LIMIT = 0.8  # of one processor
RANDOM_PROMPTS = 100  # of --random-input-len without --num-prompts


class PositiveOrInf(click.ParamType):  # type: ignore[type-arg]
    """A number above 0, or ``inf``."""

    name = "x|inf"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not number > 0:
            self.fail(f"{value!r} is neither a number above 0 nor 'inf'.", param, ctx)
        return number


def _percentiles(ctx: click.Context, param: click.Parameter, value: str) -> list[float]:
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(0 <= number <= 100 for number in numbers):
        raise click.BadParameter(f"{value!r} is not a list of numbers from 0 to 100 like 50,90,99.", ctx, param)
    return list(dict.fromkeys(numbers))


def _base_url(ctx: click.Context, param: click.Parameter, value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise click.BadParameter(f"{value!r} is not a URL like http://127.0.0.1:8000.", ctx, param)
    return value.rstrip("/").removesuffix("/v1")


def _json_object(ctx: click.Context, param: click.Parameter, value: str) -> dict[str, Any]:
    try:
        content = json.loads(value)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise click.BadParameter(f"{value!r} is not a JSON object.", ctx, param)
    return content


def _goodput(ctx: click.Context, first: Sequence[str], more: Sequence[str]) -> dict[str, float]:
    """``--goodput a:1 b:2``: what follows the first one reaches us as arguments of the command."""
    from pearl_ray.commands.load_report import parse_goodput

    if more and not first:
        raise click.UsageError(f"Got unexpected extra argument ({more[0]})", ctx)
    try:
        return parse_goodput([*first, *more])
    except ValueError as error:
        raise click.UsageError(f"--goodput: {error}", ctx) from None


def _writable(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and not value.resolve().parent.is_dir():
        raise click.BadParameter(f"there is no directory {value.parent}.", ctx, param)
    return value


_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group(invoke_without_command=True)
@click.pass_context
def bench(ctx: click.Context) -> None:
    """Measure a server."""
    if ctx.invoked_subcommand is None:
        raise click.UsageError("bench needs to be told what to measure; run: pearl-ray bench serve --help", ctx)


@bench.command("serve")
@config_option()
@option("--base-url", default="http://127.0.0.1:8000", callback=_base_url, help="Of the server, with or without /v1.")
@option("--model", help="What the server calls the model.  [default: the first of its /v1/models]")
@option("--api-key", show_default=False, help="Sent as Bearer token; of several separated by spaces the first.")
@option("--endpoint", type=click.Choice(["chat", "completions"]), default="chat", help="Which API to ask.")
@option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='File of JSON lines with "prompt" or "turns" (the first is asked); repeated if there are too few.',
)
@option("--random-input-len", type=click.IntRange(1), help="Instead: random prompts of so many tokens.")
@option(
    "--random-output-len",
    type=click.IntRange(1),
    default=128,
    help="Tokens of each answer to a random prompt; sent with ignore_eos.",
)
@option("--output-len", type=click.IntRange(1), default=256, help="Most tokens of an answer to a prompt of a file.")
@option("--ignore-eos", is_flag=True, help="Let answers to a file's prompts go on to --output-len tokens too.")
@option("--temperature", type=click.FloatRange(0.0), default=0.0, help="0 is greedy.")
@option("--extra-body", default="{}", callback=_json_object, help="JSON object of more fields for each request.")
@option(
    "--num-prompts",
    type=click.IntRange(1),
    help=f"Requests to send.  [default: as many as the file has; {RANDOM_PROMPTS} random ones]",
)
@option("--request-rate", type=PositiveOrInf(), default="inf", help="Requests per second; inf: all at once.")
@option(
    "--burstiness",
    type=PositiveOrInf(),
    default="1.0",
    help="Of the intervals between requests: 1: Poisson, less: burstier, inf: all the same.",
)
@option("--max-concurrency", type=click.IntRange(1), help="Most requests out at one time.  [default: no bound]")
@option("--request-timeout", type=click.FloatRange(0.0, min_open=True), default=600.0, help="Seconds per request.")
@option("--max-duration", type=click.FloatRange(0.0, min_open=True), default=3600.0, help="Seconds for all of them.")
@option(
    "--goodput",
    "first_goodput",
    multiple=True,
    metavar="METRIC:MS ...",
    help="Count requests within these bounds in milliseconds: ttft, tpot or itl (mean per token), e2el.",
)
@option("--percentiles", default="50,90,99", callback=_percentiles, help="Of each latency, to be shown.")
@option("--save-result", type=_FILE, callback=_writable, help="Write every figure and request to this JSON file.")
@option("--plot", type=_FILE, callback=_writable, help="Draw TTFT and inter-token latency to this file (.png, .svg).")
@option("--seed", type=click.IntRange(0), default=0, help="Of arrival times and random prompts.")
@click.argument("more_goodput", nargs=-1, metavar="")
@debug_option()
@click.pass_context
def bench_serve(
    ctx: click.Context,
    /,
    first_goodput: Sequence[str],
    more_goodput: Sequence[str],
    **values: Any,  # noqa: ANN401
) -> None:
    """Send requests to an OpenAI-compatible server (pearl-ray, vLLM, …) and print how it bore them.

    Tokens are counted by the server's usage. Within an answer they are dealt to its chunks by their share of the text,
    so that inter-token latencies of servers that send one token or several per chunk can be compared.
    """
    import httpx

    from pearl_ray.commands.load import BadAnswerError

    goodput = _goodput(ctx, first_goodput, more_goodput)
    if (values["prompts"] is None) == (values["random_input_len"] is None):
        raise click.UsageError("give either --prompts FILE.jsonl or --random-input-len N", ctx)
    if values["plot"] is not None and find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib; run: pip install 'pearl-ray[bench]'", ctx)
    try:
        target, run = asyncio.run(_run(values))
    except (httpx.HTTPError, BadAnswerError) as error:
        told = str(error) or type(error).__name__
        raise click.UsageError(f"--base-url {values['base_url']}: {told}", ctx) from None
    _tell(target, run, values, goodput)


async def _run(values: Mapping[str, Any]) -> tuple[Target, Run]:
    """Ask the server what is missing, then load it."""
    import numpy as np

    from pearl_ray.commands.load import Target, Timing, body_of, new_client, send_all, send_times
    from pearl_ray.commands.load_prompts import first_model
    from pearl_ray.commands.load_report import Run

    generator = np.random.default_rng(values["seed"])
    key = (values["api_key"] or "").split()
    target = Target(values["base_url"], values["model"] or "", values["endpoint"], key[0] if key else None)
    async with new_client(target) as client:
        if not target.model:
            target = dataclasses.replace(target, model=await first_model(client))
        prompts = await _prompts(client, target, values, generator)
    length, ignores_eos = values["output_len"], values["ignore_eos"]
    if values["prompts"] is None:
        length, ignores_eos = values["random_output_len"], True
    extra = {"temperature": values["temperature"]} | ({"ignore_eos": True} if ignores_eos else {})
    bodies = [body_of(target, prompt, length, extra | values["extra_body"]) for prompt in prompts]
    times = send_times(len(bodies), values["request_rate"], values["burstiness"], generator)
    timing = Timing(values["request_timeout"], values["max_duration"], values["max_concurrency"])
    with counting_bar(progress_console(), "requests", len(bodies)) as advance:
        cpu_s = time.process_time()
        answers, duration = await send_all(target, bodies, times, timing, advance)
        cpu_s = time.process_time() - cpu_s
    how = (values["request_rate"], values["burstiness"], values["max_concurrency"])
    return target, Run(answers, duration, *how, client_cpu_s=cpu_s)


async def _prompts(client: Any, target: Target, values: Mapping[str, Any], generator: Any) -> list[Any]:  # noqa: ANN401
    from pearl_ray.commands.load_prompts import random_prompts, read_prompts

    count = values["num_prompts"]
    if values["prompts"] is None:
        return list(
            await random_prompts(client, target, count or RANDOM_PROMPTS, values["random_input_len"], generator)
        )
    try:
        texts = read_prompts(values["prompts"])
    except ValueError as error:
        raise click.UsageError(f"--prompts {values['prompts']}: {error}") from None
    return [texts[i % len(texts)] for i in range(count or len(texts))]


def _tell(target: Target, run: Run, values: Mapping[str, Any], goodput: Mapping[str, float]) -> None:
    """The table, the files, and what was wrong.

    Raises:
        ClickException: no request succeeded.
    """
    from pearl_ray.commands.load_report import draw, results, single, table

    found = results(run, values["percentiles"], goodput)
    output_console().print(table(found, values["percentiles"]))
    if values["save_result"] is not None:
        head = {
            "date": time.strftime("%Y%m%d-%H%M%S"),
            "base_url": target.base_url,
            "endpoint": target.endpoint,
            "model_id": target.model,
            "seed": values["seed"],
        }
        values["save_result"].write_text(json.dumps({**head, **found, **single(run)}, indent=1), "utf-8")
    if values["plot"] is not None and run.succeeded:
        draw(run.succeeded, values["percentiles"], values["plot"])
    failures = [answer.error for answer in run.answers if answer.error is not None]
    if not run.succeeded:
        raise _AllFailedError(f"all {len(failures)} requests failed; the first: {failures[0]}")
    if failures:
        progress_console().print(f"Warning: {len(failures)} failed; the first: {failures[0]}", markup=False)
    if run.client_cpu_s > CLIENT_LIMIT * run.duration:
        progress_console().print("Warning: this client was busy itself and may have been the limit.", markup=False)
    if not all(answer.has_usage for answer in run.succeeded):
        progress_console().print(
            "Warning: the server sent no usage: each chunk counts as a token, prompts as none.", markup=False
        )


class _AllFailedError(click.ClickException):
    exit_code = 2
