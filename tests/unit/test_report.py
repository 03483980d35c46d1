"""What a deployment says of itself, without Ray: status, and the log lines of its actors."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from pearl_ray.actors import report
from pearl_ray.actors.bringup import BringUp, Deployment
from pearl_ray.actors.logs import log_to_stderr
from pearl_ray.actors.spec import DeploymentSpec
from pearl_ray.commands.status import rows
from pearl_ray.model.graphs import GraphFigures


def deployment_spec() -> DeploymentSpec:
    plain = {field.name: None for field in dataclasses.fields(DeploymentSpec)}
    return DeploymentSpec(**plain | {"name": "d", "mode": "pearl", "target_tp": 2, "draft_tp": 1})


def status_of(figures: dict[tuple[str, int], GraphFigures | None]) -> dict[str, object]:
    """The status of a deployment whose shards have these figures."""

    async def answer(of: GraphFigures | None) -> GraphFigures | None:
        return of

    spec = deployment_spec()
    shards = {
        key: SimpleNamespace(graphs=SimpleNamespace(remote=lambda of=of: answer(of))) for key, of in figures.items()
    }
    graphs = asyncio.run(BringUp(spec, shards)._graphs())
    return report.status(spec, Deployment(shards, {}, 8, 64, None, {}, graphs=graphs), None)


def test_status_has_what_graphs_cost_the_rank_of_each_model_that_paid_most():
    found = status_of(
        {
            ("draft", 0): GraphFigures(12, 0, 0.75, 1 << 28),
            ("target", 0): GraphFigures(58, 3, 2.5, 1 << 29),
            ("target", 1): GraphFigures(58, 3, 3.25, 1 << 28),
        }
    )
    assert found["graphs"] == {
        "draft": {"num_captured": 12, "num_skipped": 0, "seconds": 0.75, "bytes": 1 << 28},
        "target": {"num_captured": 58, "num_skipped": 3, "seconds": 3.25, "bytes": 1 << 29},
    }
    printed = dict(rows(found))
    assert printed["draft CUDA graphs"] == "12 in 0.8 s and 0.25 GiB"
    assert printed["target CUDA graphs"] == "58 in 3.2 s and 0.50 GiB, 3 left out by the budget"


def test_on_cpus_and_before_it_is_up_a_deployment_has_no_figures_of_graphs():
    found = status_of({("draft", 0): None, ("target", 0): None, ("target", 1): None})
    assert found["graphs"] is None and not any("graphs" in name for name, _ in rows(found))
    assert report.status(deployment_spec(), None, None)["graphs"] is None


@contextmanager
def fresh_process() -> Iterator[tuple[logging.Logger, logging.Logger]]:
    """The root logger and ours as they are where an actor begins; pytest's own handlers come back at the end."""
    root, ours = logging.getLogger(), logging.getLogger("pearl_ray")
    handlers, level = root.handlers, ours.level
    root.handlers = []
    ours.setLevel(logging.NOTSET)
    try:
        yield root, ours
    finally:
        root.handlers = handlers
        ours.setLevel(level)


def test_an_actors_own_lines_from_info_on_go_to_its_stderr(capsys):
    with fresh_process():
        for _ in range(2):  # the second time changes nothing
            log_to_stderr()
        logging.getLogger("pearl_ray.somewhere").info("graphs: %d", 3)
        logging.getLogger("pearl_ray.somewhere").debug("too much")
        logging.getLogger("another").info("not ours")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith(" INFO pearl_ray.somewhere: graphs: 3\n")


def test_a_root_logger_that_is_configured_and_a_level_that_was_chosen_stay():
    with fresh_process() as (root, ours):
        ours.setLevel(logging.DEBUG)
        log_to_stderr()
        assert len(root.handlers) == 1 and ours.level == logging.DEBUG
    with fresh_process() as (root, ours):
        root.handlers = [handler := logging.NullHandler()]
        log_to_stderr()
        assert root.handlers == [handler] and ours.level == logging.NOTSET
