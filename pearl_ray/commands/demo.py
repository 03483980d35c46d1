"""``pearl-ray demo``: one prompt, answered by PEARL, with each token in the colour of what committed it."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from pearl_ray.commands.console import figures, legend, output_console, paint, pieces, progress_console
from pearl_ray.commands.engines import own_engine
from pearl_ray.commands.options import (
    ENGINE_OPTIONS,
    apply,
    debug_option,
    option,
    sampling_options,
    take_config,
    take_sampling,
)
from pearl_ray.core.outputs import RequestOutput

PROMPT = "Write a Python function that returns the n-th Fibonacci number, and explain how it works."


@click.command()
@option("--prompt", default=PROMPT, help="What to ask.")
@option("--compare/--no-compare", default=True, help="Then answer again by the target alone, and compare.")
@apply(sampling_options(max_tokens=96, temperature=0.0))
@apply(ENGINE_OPTIONS)
@debug_option()
def demo(prompt: str, compare: bool, **values: Any) -> None:  # noqa: ANN401 - click's values
    """Let a real pair of models answer a prompt, and show how. The embedded pair runs on a CPU."""
    params = take_sampling(values)
    config = take_config(values)
    console = output_console()
    console.print(f"> {prompt}\n", style="bold", markup=False)
    messages = [{"role": "user", "content": prompt}]
    alone = None
    with own_engine(config) as engine:
        with progress_console().status("answering"):
            engine.chat(messages, dataclasses.replace(params, max_tokens=4, min_tokens=0))  # warm up
            answer = engine.chat(messages, params)[0]
        first = answer.outputs[0]
        console.print(paint(pieces(engine.tokenizer.decode, answer.prompt_token_ids, first.token_ids, first.origins)))
        console.print()
        console.print(legend(first.origins))
        if compare and config.uses_draft:
            with progress_console().status("answering by the target alone"):
                repeated = dataclasses.replace(params, seed=answer.seed, num_speculative_tokens=0)
                alone = engine.chat(messages, repeated)[0]
    console.print(figures(f"{config.mode}, {config.verification}", rows(answer, alone)))


def rows(answer: RequestOutput, alone: RequestOutput | None) -> list[tuple[str, str]]:
    """The table's rows: speed, figures of the algorithm, and the comparison with the target alone."""
    metrics = answer.metrics
    num_tokens = len(answer.outputs[0].token_ids)
    table = [
        ("tokens", str(num_tokens)),
        ("time to first token", _seconds(metrics.time_to_first_token_s)),
        ("tokens/s behind the first", f"{decode_speed(answer):.1f}"),
        ("tokens per target forward", f"{metrics.tokens_per_target_forward:.2f}"),
        ("run length (accepted between two rejections)", f"{metrics.mean_run_length:.2f}"),
        ("drafted, accepted", f"{metrics.num_drafted}, {metrics.num_accepted}"),
    ]
    table += [(f"rounds in {phase}", str(count)) for phase, count in metrics.rounds.items()]
    if alone is not None:
        speed = decode_speed(alone)
        table.append(("tokens/s by the target alone", f"{speed:.1f}"))
        if speed:
            table.append(("speed-up", f"{decode_speed(answer) / speed:.2f}×"))
        same = answer.outputs[0].token_ids == alone.outputs[0].token_ids
        table.append(("the same tokens as the target alone", "yes" if same else "no"))
    return table


def decode_speed(output: RequestOutput) -> float:
    """Tokens behind the first one per second; 0 where there was none."""
    metrics = output.metrics
    first, last = metrics.time_to_first_token_s, metrics.e2e_latency_s
    if first is None or last is None or last <= first:
        return 0.0
    return (len(output.outputs[0].token_ids) - 1) / (last - first)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"
