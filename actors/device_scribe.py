"""One round's drafting where the steps feed each other on the device. The host's part: what goes in, what comes out.

Knows replicas and messages; knows no kernels. Able only where no row needs the host between two steps.
"""

from __future__ import annotations

import numpy as np

from pearl_ray.core.messages import MAX_PROPOSALS, Window
from pearl_ray.core.phases import Node
from pearl_ray.core.replica import Replica
from pearl_ray.core.sampling import Row
from pearl_ray.core.schedule import RoundPlan
from pearl_ray.model.batching import Entry
from pearl_ray.model.draft_steps import Drafted, DraftSteps, Writer


def is_plain(row: Row, *, with_grammars: bool = True) -> bool:
    """Whether the row's logits are drawn from as they are: no penalty, bias or mask, nor (by default) a grammar's."""
    params = row.params
    if params.has_penalties or params.logit_bias or len(row.masked):
        return False
    return params.structured_outputs is None or not with_grammars


class DeviceScribe:
    """See ``draft_loop``: write, then make the window's message. ``first``: what step 1 feeds."""

    def __init__(self, replica: Replica, steps: DraftSteps, plan: RoundPlan, first: list[Entry]) -> None:
        self._replica, self._steps, self._plan, self._first = replica, steps, plan, first
        self._works = [work for work in plan.works if work.num_drafted]
        self._rows = []
        for work in self._works:
            sequence = replica.sequences[work.seq_id]
            state = sequence.state
            self._rows.append(sequence.row(state.num_committed + len(state.pending), _tokens(state.pending)))
        self._drafted = Drafted(np.zeros((0, 0), np.int32), None, None)
        self._begun = steps.num_steps

    @property
    def num_steps(self) -> int:
        """Forward passes of this round."""
        return self._steps.num_steps - self._begun

    def is_able(self, *, with_grammars: bool) -> bool:
        """Whether every row is plain; ``with_grammars``: the draft is to obey grammars, which takes the host."""
        return all(is_plain(row, with_grammars=with_grammars) for row in self._rows)

    def write(self) -> list[tuple[Node, ...]]:
        """Draft; returns the nodes per work of the plan."""
        writers = []
        for work, row in zip(self._works, self._rows, strict=True):
            sequence = self._replica.sequences[work.seq_id]
            rejection = sequence.join.rejection
            writers.append(Writer(work.seq_id, sequence.draft_blocks, row, work.num_drafted, rejection))
        if self._first:
            self._drafted = self._steps.write(self._first, writers)
        columns = iter(self._drafted.tokens_WS.T.tolist())
        return [
            tuple(map(Node, next(columns)[: work.num_drafted])) if work.num_drafted else () for work in self._plan.works
        ]

    def window(self, number: int, checksum: int) -> Window:
        """What was drafted, for the bridge."""
        drafted = self._drafted
        lengths = np.array([work.num_drafted for work in self._plan.works], dtype=np.int32)
        made = [drafted.tokens_WS[: work.num_drafted, s] for s, work in enumerate(self._works)]
        ids, probs = np.zeros((0, MAX_PROPOSALS), np.int32), np.zeros((0, MAX_PROPOSALS), np.float32)
        if drafted.ids_WSK is not None and drafted.probs_WSK is not None:
            which = [
                (s, work.num_drafted)
                for s, work in enumerate(self._works)
                if self._replica.sequences[work.seq_id].join.rejection
            ]
            ids = np.concatenate([drafted.ids_WSK[:limit, s] for s, limit in which])
            probs = np.concatenate([drafted.probs_WSK[:limit, s] for s, limit in which])
        tokens = np.concatenate(made).astype(np.int32) if made else np.zeros(0, np.int32)
        return Window(number, checksum, lengths, tokens, np.ones_like(tokens), ids, probs)


def _tokens(nodes: tuple[Node, ...]) -> list[int]:
    return [node.token for node in nodes]
