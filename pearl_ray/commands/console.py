"""What commands draw: progress bars, text coloured by its origin, tables. Knows rich; computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from pearl_ray.core.detokenizer import Detokenizer
from pearl_ray.core.phases import Origin

STYLES: dict[Origin, str] = {
    "prefill": "bold white",
    "pre_verify": "cyan",
    "post_verify": "green",
    "residual": "bold red",
    "bonus": "magenta",
    "target": "yellow",
}
MEANINGS: dict[Origin, str] = {
    "prefill": "first token, from the prompt's last logits",
    "pre_verify": "drafted, accepted by itself",
    "post_verify": "drafted, accepted while the draft went on",
    "residual": "the target's own token at a rejection",
    "bonus": "the target's extra token behind an accepted window",
    "target": "the target alone",
}


def output_console() -> Console:
    """For answers; plain where stdout is no terminal."""
    return Console(highlight=False, soft_wrap=True)


def progress_console() -> Console:
    """For bars and remarks, so that stdout holds the answers only."""
    return Console(stderr=True, highlight=False)


@contextmanager
def loading_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Bars for an engine's start; yields ``progress(stage, done, total)``. Silent without a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for earlier in tasks.values():  # one of unknown length would spin on
                    bars.update(earlier, total=1, completed=1)
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield report


@contextmanager
def counting_bar(console: Console, what: str, total: int) -> Iterator[Callable[[object], None]]:
    """A bar over many things; yields what to call with each one that is done. Silent without a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total)

        def advance(_one: object) -> None:
            bars.advance(task)

        yield advance


def pieces(
    decode: Callable[[list[int]], str], prompt_ids: Sequence[int], token_ids: Sequence[int], origins: Sequence[Origin]
) -> list[tuple[str, Origin]]:
    """An answer's text split by token, for colouring. A character goes to the token that completes it."""
    text = Detokenizer(decode, prompt_ids)
    split = [(text.append([token]).text, origin) for token, origin in zip(token_ids, origins, strict=True)]
    return [*split, (text.finish(), origins[-1])] if origins else []


def paint(split: Sequence[tuple[str, Origin]]) -> Text:
    """Pieces of text in the colours of their origins."""
    return Text.assemble(*((text, STYLES[origin]) for text, origin in split))


def legend(origins: Sequence[Origin]) -> Table:
    """What the colours mean, for the origins that occur, with how many tokens each has."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    for origin, style in STYLES.items():
        count = sum(o == origin for o in origins)
        if count:
            table.add_row(Text("██", style), origin, str(count), MEANINGS[origin])
    return table


def figures(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """A table of two columns: what, how much."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for what, value in rows:
        table.add_row(what, value)
    return table
