"""``pearl-ray generate``: answers to one prompt or a file of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pearl_ray.commands.console import counting_bar, output_console, progress_console
from pearl_ray.commands.engines import engine_or_deployment
from pearl_ray.commands.options import ENGINE_OPTIONS, apply, debug_option, option, sampling_options, take_sampling
from pearl_ray.core.outputs import RequestOutput

Prompt = str | list[int]


@click.command()
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@option(
    "--prompts",
    "prompts_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Many prompts: a JSON value per line, "text", {"prompt": "text"} or {"prompt": [token ids]}.',
)
@option(
    "--output",
    "output_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the answers here, a JSON object per line, in the prompts' order.",
)
@option("--json", "as_json", is_flag=True, help="Print the answers as JSON objects, one per line.")
@option("--name", help="Ask this running deployment.  [default: an own engine]")
@option("--n", type=int, default=1, help="Answers per prompt, 1 to 64.")
@apply(sampling_options(max_tokens=256, temperature=0.0))
@apply(ENGINE_OPTIONS)
@debug_option()
def generate(
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    output_file: Path | None,
    as_json: bool,
    name: str | None,
    **values: Any,  # noqa: ANN401 - click's values
) -> None:
    """Answer each PROMPT, as text to continue (for the chat template use `pearl-ray chat`)."""
    if prompts_file is not None and prompts:
        raise click.UsageError("--prompts and PROMPT exclude each other; give one of them.")
    wanted: Sequence[Prompt] = read_prompts(prompts_file) if prompts_file is not None else prompts
    if not wanted:
        raise click.UsageError("nothing to answer; give a PROMPT, or --prompts FILE.jsonl.")
    if output_file is not None and not output_file.parent.is_dir():
        raise click.BadParameter(f"there is no directory {output_file.parent}.", param_hint="--output")
    params = take_sampling(values)
    with engine_or_deployment(name, values) as engine, counting_bar(progress_console(), "prompts", len(wanted)) as bar:
        outputs = engine.generate(list(wanted), params, on_progress=bar)
    lines = [json.dumps(dataclasses.asdict(output), ensure_ascii=False) for output in outputs]
    if output_file is not None:
        output_file.write_text("".join(line + "\n" for line in lines), "utf-8")
    if as_json:
        click.echo("\n".join(lines))
    elif output_file is None:
        _print(outputs)


def _print(outputs: Sequence[RequestOutput]) -> None:
    console = output_console()
    for number, output in enumerate(outputs):
        for answer in output.outputs:
            if len(outputs) > 1 or len(output.outputs) > 1:
                console.print(f"--- prompt {number + 1}, answer {answer.index + 1}", style="dim")
            console.print(answer.text, markup=False)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSON Lines file; raises ``BadParameter`` naming the line."""
    prompts: list[Prompt] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{path} is not UTF-8 text: {error}", param_hint="--prompts") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise click.BadParameter(f"{path}:{number}: not JSON: {error}", param_hint="--prompts") from None
        prompt: Any = value.get("prompt") if isinstance(value, dict) else value
        if not _is_prompt(prompt):
            text = f'{path}:{number}: wants "text", {{"prompt": "text"}} or {{"prompt": [token ids]}}.'
            raise click.BadParameter(text, param_hint="--prompts")
        prompts.append(prompt)
    return prompts


def _is_prompt(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(token) is int for token in value)
    return isinstance(value, str) and bool(value)
