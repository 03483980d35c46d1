"""Phases: what one round does to one sequence. Knows nothing of Ray, tensors, time, or other sequences.

This is PEARL's algorithm (Liu et al., ICLR 2025, §4), written once for all modes as DESIGN's "as one step". At the
start of a round a sequence has C committed tokens x_0 … x_{C-1} and m pending (drafted, untested) ones:

* the target feeds x_{C-1} and the pending tokens, and so gets p for the positions C … C + m;
* the draft makes w new tokens behind the pending ones, at the same time (in SD: just before);
* the pending tokens and the first new one are tested in order (in SD all the new ones are; there m = 0);
* everything accepted is committed; at the first failure the target's own token is, and the rest is dropped;
* if all was accepted, the untested new tokens are the next round's pending ones.

PRE_VERIFY is m = 0 and POST_VERIFY is m > 0: the phase is read off the state, never stored beside it. AR is w = 0 and
m = 0. ``transition`` is applied by every replica: the coordinator, the target's ranks and the draft's ranks.
"""

from __future__ import annotations

import enum
from typing import Literal, NamedTuple

import msgspec
import numpy as np

Mode = Literal["pearl", "sd", "ar"]
Origin = Literal["prefill", "pre_verify", "post_verify", "residual", "bonus", "target"]


class Phase(enum.Enum):
    """Where a sequence stands."""

    PREFILL = "prefill"
    PRE_VERIFY = "pre_verify"
    POST_VERIFY = "post_verify"


class Proposal(NamedTuple):
    """The distribution q a token was drawn from, under `rejection`: at most 64 (id, float32 probability) pairs."""

    ids_K: np.ndarray
    probs_K: np.ndarray


# The values below are frozen msgspec structs: made several times per sequence and round, they cost a fifteenth of what
# frozen dataclasses do. No reference cycle can lead through them, so the garbage collector needn't look (``gc=False``).


class Node(msgspec.Struct, frozen=True, gc=False):
    """A drafted token; ``parent`` says how many nodes back the one stands that it follows: 1 in a chain.

    Counted back, not from the front, so that what is left of a window is one too. Before the first node stands the
    newest committed token.
    """

    token: int
    parent: int = 1
    proposal: Proposal | None = None


class SequenceState(msgspec.Struct, frozen=True, gc=False):
    """One sequence between two rounds.

    Attributes:
        num_prompt: tokens of the prompt; the boundary stays where it is when a preempted sequence is replayed.
        num_committed: C, final tokens, prompt included.
        max_total: no token at this index or beyond is ever wanted (max_tokens, the model's length).
        window: tokens the draft makes per round; 0 decodes autoregressively.
        pending: drafted tokens not tested yet, m of them.
        target_kv, draft_kv: tokens whose K and V each model's cache holds. Between rounds of a decoding sequence the
            target has C - 1; the draft has C + m - 1 in steady PEARL, fewer where it has to catch up.
    """

    num_prompt: int
    num_committed: int
    max_total: int
    window: int
    pending: tuple[Node, ...] = ()
    target_kv: int = 0
    draft_kv: int = 0

    @property
    def phase(self) -> Phase:
        """Read off the counts."""
        if not self.is_decoding:
            return Phase.PREFILL
        return Phase.POST_VERIFY if self.pending else Phase.PRE_VERIFY

    @property
    def prefill_goal(self) -> int:
        """Tokens the target must hold before the sequence decodes.

        A prompt is fed whole, and its last row gives the first output token; a replayed sequence is fed up to its last
        committed token, which the next round feeds.
        """
        return self.num_committed if self.num_committed == self.num_prompt else self.num_committed - 1

    @property
    def is_decoding(self) -> bool:
        """Whether the target's cache lacks just the token it feeds first in a round."""
        return self.num_committed > self.num_prompt and self.target_kv == self.num_committed - 1

    @property
    def is_full(self) -> bool:
        """Whether the sequence has all the tokens it may have; it then waits for its Leave."""
        return self.num_committed >= self.max_total


class Round(msgspec.Struct, frozen=True, gc=False):
    """What happened to a sequence in one round.

    Attributes:
        target_fed, draft_fed: tokens each model fed, those the draft made itself not counted.
        drafted: the draft's new tokens.
        num_tested: how many of pending + drafted the target judged.
        num_accepted: how many of those it accepted, from the front.
        token: the target's own next token: the replacement after a rejection, the bonus of SD, AR's or the prefill's
            token; -1 where there is none.
    """

    target_fed: int
    draft_fed: int = 0
    drafted: tuple[Node, ...] = ()
    num_tested: int = 0
    num_accepted: int = 0
    token: int = -1


class Commit(msgspec.Struct, frozen=True, gc=False):
    """Effect: these tokens are final, each with where it came from."""

    tokens: tuple[int, ...]
    origins: tuple[Origin, ...]


def transition(state: SequenceState, event: Round) -> tuple[SequenceState, Commit]:
    """The state after a round, and what it commits.

    Works for every mode: PEARL tests m pending tokens and one new one, SD tests its w new ones and adds the target's
    next token, AR tests none.
    """
    if not state.is_decoding:
        return _prefill(state, event)
    drafted, token = event.drafted, event.token
    nodes, num_accepted = state.pending + drafted, event.num_accepted
    assert num_accepted <= event.num_tested <= len(nodes)
    rejected = num_accepted < event.num_tested
    tokens = [node.token for node in nodes[:num_accepted]] if num_accepted else []
    origin: Origin = "post_verify" if state.pending else "pre_verify"
    origins = (origin,) * num_accepted
    pending: tuple[Node, ...] = ()
    if token >= 0:
        last: Origin = "residual" if rejected else "bonus" if nodes else "target"
        tokens.append(token)
        origins += (last,)
    else:
        assert not rejected, "a rejection comes with a replacement"
        pending = nodes[num_accepted:]
    committed = state.num_committed + len(tokens)
    known = committed + len(pending) - 1
    # The draft fed everything up to the last token it made; what was dropped is overwritten by later rounds.
    draft_kv = state.draft_kv + event.draft_fed
    if drafted:
        draft_kv += len(drafted) - 1
    after = SequenceState(
        state.num_prompt,
        committed,
        state.max_total,
        state.window,
        pending,
        committed - 1,
        draft_kv if draft_kv < known else known,
    )
    assert state.target_kv + event.target_fed >= committed - 1 and known < state.max_total, (state, event)
    return after, Commit(tuple(tokens), origins)


def _prefill(state: SequenceState, event: Round) -> tuple[SequenceState, Commit]:
    """A chunk was fed; after the prompt's last one the first output token is committed."""
    assert not event.drafted and not event.num_tested
    target_kv = state.target_kv + event.target_fed
    assert target_kv <= state.prefill_goal
    draft_kv = state.draft_kv + event.draft_fed
    after = msgspec.structs.replace(state, target_kv=target_kv, draft_kv=draft_kv)
    if event.token < 0:
        return after, Commit((), ())
    assert target_kv == state.num_committed == state.num_prompt
    after = msgspec.structs.replace(after, num_committed=state.num_committed + 1)
    return after, Commit((event.token,), ("prefill",))
