"""``pearl-ray chat``: a talk in the terminal, with a running deployment or an engine of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pearl_ray.commands.console import output_console
from pearl_ray.commands.engines import engine_or_deployment
from pearl_ray.commands.options import ENGINE_OPTIONS, apply, debug_option, option, sampling_options, take_sampling
from pearl_ray.core.params import SamplingParams

if TYPE_CHECKING:
    from pearl_ray.client import Client
    from pearl_ray.engine import PearlEngine


@click.command()
@option("--name", help="Talk to this running deployment.  [default: an own engine]")
@option("--system", help="System message to begin with.")
@apply(sampling_options(max_tokens=512, temperature=0.6))
@apply(ENGINE_OPTIONS)
@debug_option()
def chat(name: str | None, system: str | None, **values: Any) -> None:  # noqa: ANN401 - click's values
    """Talk to the model. /reset forgets what was said, /exit or Ctrl-D ends."""
    params = take_sampling(values)
    beginning = [{"role": "system", "content": system}] if system else []
    with engine_or_deployment(name, values) as engine:
        messages = list(beginning)
        while True:
            said = _ask()
            if said is None or said == "/exit":
                return
            if said == "/reset":
                messages = list(beginning)
            elif said:
                messages.append({"role": "user", "content": said})
                messages.append({"role": "assistant", "content": _answer(engine, messages, params)})


def _ask() -> str | None:
    """A line from the user; None at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        click.echo()
        return None


def _answer(engine: PearlEngine | Client, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Stream the answer to the terminal; Ctrl-C cuts it short and keeps what came."""
    console = output_console()
    text, request_id = "", None
    try:
        for chunk in engine.stream(messages, params):
            request_id = chunk.request_id
            text += chunk.text
            console.print(chunk.text, end="", markup=False)
    except KeyboardInterrupt:
        if request_id is not None:
            engine.abort(request_id)
    console.print()
    return text
