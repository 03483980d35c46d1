"""What each model does in the next round, for the whole batch. A pure function of the batch: every replica computes it.

Decoding sequences come first; what is left of the token budget is shared among the sequences in prefill, so that a
long prompt doesn't keep a short one waiting; beside decoding sequences long prompts go at a pace. Knows nothing of
requests and of time: who is in the batch, and how fast prompts may go, was decided before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from pearl_ray.core.phases import Mode, SequenceState

ROUND = 16  # the unit of ``Pace.every`` and ``RoundPlan.debt``: sixteenths of a round
MOST_ROUNDS = 64  # a long prompt gets a chunk at least so often
CATCH_UP = 2  # tokens a round that a draft which is behind gets at least: its sequence goes on by one meanwhile


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a round: the mode, and the tokens one forward pass may feed beside the decoding rows."""

    mode: Mode
    max_num_batched_tokens: int


class Pace(msgspec.Struct, frozen=True, gc=False):
    """How fast long prompts go beside decoding sequences.

    Attributes:
        tokens: most tokens that all of them together feed in a round, for either model.
        every: sixteenths of a round from one chunk to the next: 16 is in every round, 17 in 16 rounds of 17.
    """

    tokens: int
    every: int = ROUND


class Prefill(msgspec.Struct, frozen=True, gc=False):
    """What a round does for prompts.

    Attributes:
        num_long: prompts that the round's whole budget, evenly shared, would not finish.
        tokens: what those, and drafts that are far behind, feed; of target and draft the larger.
        room: what they would have fed unpaced.
        others: what all others feed, both models together; they finish in this round.
    """

    num_long: int
    tokens: int
    room: int
    others: int

    @property
    def rests(self) -> bool:
        """Whether prompts wait and nothing of them is fed."""
        return not self.tokens and not self.others


class Work(msgspec.Struct, frozen=True, gc=False):
    """One sequence's part of a round.

    Attributes:
        target_fed: tokens the target feeds, from position ``state.target_kv``; 0: nothing.
        num_rows: of these, how many (the last ones) give a distribution to sample from or test against.
        num_tested: drafted tokens (pending, then new) the target judges.
        draft_fed: tokens the draft feeds in its first step, from position ``state.draft_kv``.
        num_drafted: w, new tokens the draft makes.
    """

    seq_id: int
    target_fed: int
    num_rows: int
    num_tested: int
    draft_fed: int
    num_drafted: int


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """The round's work, in the batch's order, of the sequences that have any.

    Attributes:
        num_decoding: sequences of which the target verifies or decodes something.
        prefill: None where neither a prompt nor a draft that is behind waits for anything.
        debt: sixteenths of a round that long prompts have to rest for, after this round.
    """

    works: tuple[Work, ...]
    num_decoding: int = 0
    prefill: Prefill | None = None
    debt: int = 0

    @property
    def num_drafted(self) -> int:
        """New tokens of all sequences: 0 means that no window crosses the bridge."""
        return sum([work.num_drafted for work in self.works])

    @property
    def num_target_rows(self) -> int:
        """Query tokens of the target's forward pass."""
        return sum([work.target_fed for work in self.works])


@dataclass(slots=True)
class Member:
    """A sequence of the batch as the schedule sees it; capacities are tokens that fit in the blocks it holds.

    ``needs_draft``: under `rejection` a token without a proposal is drawn from other noise, so the sequence waits while
    its draft is behind; else the load would decide its text. (A `coupled` one goes on alone: its text is the same.)
    """

    seq_id: int
    state: SequenceState
    target_capacity: int
    draft_capacity: int
    needs_draft: bool = False


def plan_round(members: Iterable[Member], limits: Limits, pace: Pace | None = None, debt: int = 0) -> RoundPlan:
    """Decide the round. Deterministic in its arguments; sequences without room or work are left out.

    ``pace`` (None: as fast as they go) holds for long prompts, in rounds in which others decode; ``debt`` is the one
    of the round before.
    """
    mode = limits.mode
    works: list[Work | None] = []
    prefilling: list[tuple[int, Member]] = []  # with their places in ``works``, as in ``behind``
    behind: list[tuple[int, Member]] = []
    target_budget = draft_budget = limits.max_num_batched_tokens
    num_waiting = 0  # for their draft alone
    for member in members:
        state = member.state
        if state.is_full:
            continue
        if not state.is_decoding:
            prefilling.append((len(works), member))
            works.append(None)
            continue
        work = _decode(member, mode, draft_budget)
        if work is None:
            continue
        if work.num_drafted == 0 and state.window > 0 and mode != "ar":
            behind.append((len(works), member))
            if member.needs_draft and state.num_committed + len(state.pending) < state.max_total:
                work = Work(member.seq_id, 0, 0, 0, 0, 0)
                num_waiting += 1
        target_budget -= work.target_fed
        draft_budget -= work.draft_fed
        works.append(work)
    num_decoding = len(works) - len(prefilling) - num_waiting
    if not prefilling and not behind:
        return RoundPlan(tuple(works), num_decoding)  # type: ignore[arg-type]  # None: sequences in prefill only
    target = _Chunks.share(target_budget, [(_target_lack(m), m.seq_id) for _, m in prefilling])
    draft_lacks = [(_draft_lack(m), m.seq_id) for _, m in prefilling + behind] if mode != "ar" else []
    draft = _Chunks.share(draft_budget, draft_lacks)
    room = max(target.room, draft.room)
    debt = _pace((target, draft), pace, debt, len(behind)) if num_decoding and pace is not None else 0
    for place, member in behind:
        work = works[place]
        assert work is not None
        fed = draft.tokens.get(member.seq_id, 0)
        idle = not work.target_fed and not fed
        works[place] = None if idle else Work(work.seq_id, work.target_fed, work.num_rows, work.num_tested, fed, 0)
    for place, member in prefilling:
        works[place] = _prefill(member, target.tokens.get(member.seq_id, 0), draft.tokens.get(member.seq_id, 0))
    num_long = len({seq_id for _, seq_id in target.long + draft.long} - {m.seq_id for _, m in behind})
    prefill = Prefill(num_long, max(target.room, draft.room), room, target.others + draft.others)
    return RoundPlan(tuple([work for work in works if work is not None]), num_decoding, prefill, debt)


def _decode(member: Member, mode: Mode, draft_budget: int) -> Work | None:
    """A decoding sequence's work, or None where its blocks don't reach (they are on their way)."""
    state = member.state
    m, committed = len(state.pending), state.num_committed
    drafted = 0 if mode == "ar" or state.window == 0 else _num_drafted(member, mode, draft_budget)
    rows = 1 + (drafted if mode == "sd" else m)
    if committed + rows > state.max_total:
        rows = state.max_total - committed
    if committed - 1 + rows > member.target_capacity:
        return None
    tested = m + drafted if m + drafted < rows else rows
    draft_fed = committed + m - state.draft_kv if drafted else 0
    return Work(member.seq_id, rows, rows, tested, draft_fed, drafted)


def _num_drafted(member: Member, mode: Mode, draft_budget: int) -> int:
    """w: the window, cut to what the cache, the budget and the sequence's end allow."""
    state = member.state
    base = state.num_committed + len(state.pending)
    lack = base - state.draft_kv
    if lack > 1 and lack > draft_budget:
        return 0  # the draft is behind by more than a chunk: it catches up without drafting
    last = state.max_total if state.max_total <= member.draft_capacity else member.draft_capacity + 1
    if mode == "sd" and last > base + member.target_capacity - state.num_committed:
        # Room for the drafted rows in the target's cache; at the end no row is left for a bonus.
        last = base + member.target_capacity - state.num_committed
    if base + state.window <= last:
        return state.window
    return last - base if last > base else 0


def _prefill(member: Member, target_fed: int, draft_fed: int) -> Work | None:
    """A chunk of a sequence's known tokens for either model; None where neither gets any."""
    if not target_fed and not draft_fed:
        return None
    state = member.state
    samples = (
        target_fed > 0
        and state.num_committed == state.num_prompt
        and state.target_kv + target_fed == state.num_committed
    )
    return Work(member.seq_id, target_fed, int(samples), 0, draft_fed, 0)


def _target_lack(member: Member) -> int:
    goal = member.state.prefill_goal
    return max(min(goal, member.target_capacity) - member.state.target_kv, 0)


def _draft_lack(member: Member) -> int:
    """What the draft can feed before it drafts: all that is known in prefill, all but the last token in decoding."""
    state = member.state
    if state.window == 0:
        return 0
    goal = state.num_committed - 1 if state.is_decoding else state.prefill_goal
    return max(min(goal, member.draft_capacity) - state.draft_kv, 0)


@dataclass(slots=True)
class _Chunks:
    """What one model feeds of prompts in a round: ``tokens`` by sequence, ``room`` of them for ``long``, (lack, id) of
    those whose even share doesn't finish them; ``others`` for those that it does."""

    tokens: dict[int, int]
    long: list[tuple[int, int]]
    room: int
    others: int

    @staticmethod
    def share(budget: int, lacks: list[tuple[int, int]]) -> _Chunks:
        """Split ``budget`` tokens evenly: nobody gets more than it lacks, what one leaves over the others share."""
        waiting = sorted((lack, seq_id) for lack, seq_id in lacks if lack > 0)
        chunks = _Chunks({}, [], 0, 0)
        for index, (lack, seq_id) in enumerate(waiting):
            # Sorted by lack: whoever needs less than an even share is served whole; the rest is split among the others.
            share = min(lack, -(-max(budget, 0) // (len(waiting) - index)))
            if share:
                chunks.tokens[seq_id] = share
                budget -= share
            if share < lack:
                chunks.long.append((lack, seq_id))
                chunks.room += share
            else:
                chunks.others += share
        return chunks

    def slow(self, tokens: int) -> None:
        """Leave the long ones ``tokens`` together."""
        for _, seq_id in self.long:
            self.tokens.pop(seq_id, None)
        given = _Chunks.share(tokens, self.long).tokens
        self.tokens |= given
        self.room = sum(given.values())


def _pace(both: tuple[_Chunks, _Chunks], pace: Pace, debt: int, num_behind: int) -> int:
    """Hold the long prompts to their pace; returns the debt after the round. It is 0 where there is none of them."""
    if not any(chunks.long for chunks in both):
        return 0
    rests = debt >= ROUND
    shared = len(both[1].long) if num_behind else 0  # they have even shares with the prompts
    for chunks, must in zip(both, (0, shared * CATCH_UP * -(-pace.every // ROUND)), strict=True):
        # A draft that is behind comes nearer only by more than its sequence decodes; else it doesn't rest either.
        if chunks.long and must <= chunks.room:
            chunks.slow(0 if rests else min(max(pace.tokens, must), chunks.room))
    if rests:
        return debt - ROUND
    fed = any(chunks.room for chunks in both)  # none where the decoding rows leave no room: nothing to rest for
    return debt + max(pace.every - ROUND, 0) if fed else debt
