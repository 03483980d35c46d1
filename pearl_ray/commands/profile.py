"""``pearl-ray profile``: what steps of draft and target cost here, and which windows follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import click
from rich.table import Table

from pearl_ray.commands.console import output_console
from pearl_ray.commands.engines import engine_or_deployment
from pearl_ray.commands.options import ENGINE_OPTIONS, apply, debug_option, option
from pearl_ray.core.costs import StepCosts
from pearl_ray.core.phases import Mode
from pearl_ray.core.windows import Acceptance, WindowPolicy

OBSERVED = 6400  # tests that outweigh the policy's prior
ACCEPTANCES = "0.3,0.5,0.6,0.7,0.8,0.9,0.95"


def _rates(ctx: click.Context, param: click.Parameter, value: str) -> list[float]:
    try:
        rates = [float(part) for part in value.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise click.BadParameter(f"{value!r} is not a list of numbers between 0 and 1 like 0.5,0.7,0.9.", ctx, param)
    return rates


@click.command()
@option("--name", help="What this running deployment measured at its start.  [default: an own engine]")
@option("--acceptance", default=ACCEPTANCES, callback=_rates, help="Acceptance rates to show the windows for.")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@apply(ENGINE_OPTIONS)
@debug_option()
def profile(name: str | None, acceptance: list[float], as_json: bool, **values: Any) -> None:  # noqa: ANN401
    """Measure the steps of draft and target, and print the windows that the engine chooses from them.

    A deployment goes on from this table: it corrects the costs by what rounds take, and the acceptance by its verdicts.
    """
    if name is None and values["mode"] == "ar":
        raise click.UsageError("--mode ar has no draft, and no window to choose")
    if name is None and values["num_speculative_tokens"] != "auto":
        raise click.UsageError("--num-speculative-tokens N fixes the window: nothing is measured; leave it out")
    with engine_or_deployment(name, values) as engine:
        stats, status = engine.stats(), engine.status()
    target_s = cast("Mapping[int, float]", stats["target_forward_seconds"])
    draft_s = cast("Mapping[int, float]", stats["draft_step_seconds"])
    if not target_s or not draft_s:
        raise click.UsageError(f"deployment {name!r} has a fixed window or no draft: it measured nothing at its start")
    mode = cast("Mode", status["mode"])
    shares_device = bool(status["colocate"])
    windows = windows_of(mode, StepCosts(target_s, draft_s), sorted(draft_s), acceptance, shares_device=shares_device)
    if as_json:
        found = [
            {"sequences": batch, "acceptance": rate, "window": window}
            for batch, row in windows.items()
            for rate, window in zip(acceptance, row, strict=True)
        ]
        costs = {"target_forward_seconds": dict(target_s), "draft_step_seconds": dict(draft_s)}
        click.echo(json.dumps({"mode": mode, **costs, "windows": found}))
        return
    console = output_console()
    console.print(_costs("Target forward", "rows", target_s), _costs("Draft step", "sequences", draft_s))
    console.print(_windows(mode, windows, acceptance))


def windows_of(
    mode: Mode, costs: StepCosts, batches: Sequence[int], acceptance: Sequence[float], *, shares_device: bool = False
) -> dict[int, list[int]]:
    """For each number of sequences: the window of one that joins, at each acceptance rate."""
    policies = [_policy_at(WindowPolicy(mode, None, costs, shares_device=shares_device), rate) for rate in acceptance]
    return {batch: [policy.first_window(batch) for policy in policies] for batch in batches}


def _policy_at(policy: WindowPolicy, rate: float) -> WindowPolicy:
    """The engine's own policy once so much of what it tested was accepted."""
    sequence = Acceptance()
    for test in range(OBSERVED):
        policy.observe(sequence, 1, int((test + 1) * rate) - int(test * rate))
    return policy


def _costs(title: str, what: str, seconds: Mapping[int, float]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(what, justify="right")
    table.add_column("ms", justify="right")
    for size in sorted(seconds):
        table.add_row(str(size), f"{seconds[size] * 1e3:.2f}")
    return table


def _windows(mode: Mode, windows: Mapping[int, Sequence[int]], acceptance: Sequence[float]) -> Table:
    table = Table(title=f"Window, in tokens ({mode}; 0: the target alone), by acceptance rate", title_justify="left")
    table.add_column("sequences", justify="right")
    for rate in acceptance:
        table.add_column(f"{rate:g}", justify="right")
    for batch, row in windows.items():
        table.add_row(str(batch), *map(str, row))
    return table
