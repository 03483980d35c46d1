"""The answers that are in the batch, and the cache blocks they hold. Questions and actions; who goes first is decided
elsewhere (`controller`). Knows no rounds and no queue.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from pearl_ray.core.blocks import BlockPool, Holding, PoolUsage, extend_hashes
from pearl_ray.core.messages import Extend, Join, Leave
from pearl_ray.core.phases import SequenceState
from pearl_ray.core.requests import Answer
from pearl_ray.core.schedule import Work
from pearl_ray.core.windows import Acceptance

SPARE_ROUNDS = 4  # blocks are held for this many rounds ahead: what runs on until a diff arrives
SPARE_ROUNDS_AHEAD = 6  # where rounds are queued before the verdicts of those before them are known


@dataclass(slots=True)
class Running:
    """An answer that is in the batch; ``draft`` is None in AR mode.

    ``enough_until``: committed tokens up to which the blocks held are those wanted.
    """

    answer: Answer
    seq_id: int
    target: Holding
    draft: Holding | None
    window: int
    acceptance: Acceptance = field(default_factory=Acceptance)
    enough_until: int = 0
    spare_rounds: int = SPARE_ROUNDS

    def wanted(self, num_committed: int) -> int:
        """Tokens that should fit: those of the next rounds, until a diff can arrive."""
        return min(num_committed + self.spare_rounds * (self.window + 2), self.answer.max_total)

    def set_window(self, window: int) -> None:
        """Change the window, and with it how many blocks are wanted."""
        self.window = window
        self.count_blocks()

    def count_blocks(self) -> None:
        """Set ``enough_until``, after the blocks held or the window changed."""
        capacity = self.target.capacity
        if self.draft is not None:
            capacity = min(capacity, self.draft.capacity)
        total = self.answer.max_total
        self.enough_until = total if capacity >= total else capacity - self.spare_rounds * (self.window + 2)

    def count_round(self, state: SequenceState, work: Work, num_accepted: int) -> int:
        """Note a round for a decoding sequence that began it in ``state``; returns how many tests were made."""
        answer = self.answer
        if state.pending:
            answer.num_post_verify += 1
        else:
            answer.num_pre_verify += 1
        answer.num_drafted += work.num_drafted
        answer.num_accepted += num_accepted
        return self.acceptance.observe(work.num_tested, num_accepted)

    def keep_committed(self, tokens: Sequence[int], state: SequenceState) -> None:
        """Make the blocks findable that lie wholly below C − 1 and are written."""
        below = state.num_committed - 1
        self.target.keep_committed(tokens, min(state.target_kv, below))
        if self.draft is not None:
            self.draft.keep_committed(tokens, min(state.draft_kv, below))


class Residents:
    """Attributes: ``running``, by sequence id; ``acceptances``, theirs."""

    def __init__(self, target_pool: BlockPool, draft_pool: BlockPool | None, spare_rounds: int = SPARE_ROUNDS) -> None:
        self.running: dict[int, Running] = {}
        self.acceptances: dict[int, Acceptance] = {}
        self._pools = (target_pool, draft_pool)
        self._spare_rounds = spare_rounds
        self._next_seq_id = 0

    @property
    def room(self) -> int:
        """Tokens that the smaller cache holds in all."""
        return min(pool.num_blocks * pool.block_size for pool in self._pools if pool is not None)

    def usage(self) -> dict[str, PoolUsage]:
        """Per model."""
        names = ("target", "draft")
        return {name: pool.usage() for name, pool in zip(names, self._pools, strict=True) if pool is not None}

    def by_age(self, some: Iterable[Running] | None = None) -> list[Running]:
        """All that run, or some of them: the oldest request first."""
        among = self.running.values() if some is None else some
        return sorted(among, key=lambda r: (r.answer.request.arrived, r.seq_id))

    def can_extend(self, running: Running, num_committed: int) -> bool:
        """Whether there are blocks for the next rounds."""
        wanted, target, draft = running.wanted(num_committed), running.target, running.draft
        if not target.pool.can_allocate(target.missing(wanted)):
            return False
        return draft is None or draft.pool.can_allocate(draft.missing(wanted))

    def extend(self, running: Running, num_committed: int) -> Extend | None:
        """Take them; None where enough are held."""
        wanted = running.wanted(num_committed)
        target_blocks = running.target.extend(running.target.missing(wanted))
        draft_blocks = running.draft.extend(running.draft.missing(wanted)) if running.draft is not None else []
        running.count_blocks()
        if not target_blocks and not draft_blocks:
            return None
        return Extend(running.seq_id, target_blocks, draft_blocks)

    def can_join(self, answer: Answer, window: int) -> bool:
        """Whether its tokens and the next rounds' fit in both caches, what they hold already counted.

        Beside a running batch a block per sequence stays free, so that a newcomer doesn't preempt itself next round.
        """
        wanted = min(answer.num_tokens + self._spare_rounds * (window + 2), answer.max_total)
        for pool in self._pools:
            if pool is None:
                continue
            if pool.num_free <= len(self.running):
                return False  # whatever is found, the block of the last token is not among it
            cached = self._find(pool, answer)
            need = -(-wanted // pool.block_size) - len(cached) + pool.num_free_among(cached)
            if need + len(self.running) > pool.num_free:
                return False
        return True

    def join(self, answer: Answer, window: int) -> Join:
        """Take the blocks and a sequence id."""
        tokens = answer.tokens
        holdings: list[Holding] = []
        cached_tokens = []
        for pool in self._pools:
            if pool is None:
                continue
            holding = Holding(pool, answer.block_hashes)
            cached_tokens.append(holding.start_from(self._find(pool, answer), tokens))
            holdings.append(holding)
        draft = holdings[1] if len(holdings) > 1 else None
        running = Running(answer, self._next_seq_id, holdings[0], draft, window, spare_rounds=self._spare_rounds)
        self._next_seq_id += 1
        for holding in holdings:
            holding.extend(holding.missing(running.wanted(len(tokens))))
        running.count_blocks()
        self.running[running.seq_id] = running
        self.acceptances[running.seq_id] = running.acceptance
        answer.seq_id = running.seq_id
        request = answer.request
        return Join(
            seq_id=running.seq_id,
            tokens=tokens,
            num_prompt=len(request.prompt_ids),
            params=request.params,
            rejection=request.rejection,
            seed=request.seed,
            sample_index=answer.index,
            window=window,
            max_total=answer.max_total,
            target_blocks=list(running.target.blocks),
            draft_blocks=list(running.draft.blocks) if running.draft is not None else [],
            target_cached=cached_tokens[0],
            draft_cached=cached_tokens[1] if running.draft is not None else 0,
            stop_mask=request.stop_mask(),
        )

    def leave(self, answer: Answer) -> Leave:
        """Give the blocks back; whoever takes them joins or extends in the same diff or a later one."""
        assert answer.seq_id is not None
        running = self.running.pop(answer.seq_id)
        del self.acceptances[answer.seq_id]
        running.target.release()
        if running.draft is not None:
            running.draft.release()
        answer.seq_id = None
        return Leave(running.seq_id)

    def _find(self, pool: BlockPool, answer: Answer) -> list[int]:
        """Cached blocks of the longest prefix, at least one token of which is left to feed."""
        # A prompt's log-probabilities come from feeding it: nothing of it may be skipped.
        fed_whole = answer.request.params.prompt_logprobs is not None and not answer.token_ids
        if fed_whole or not pool.prefix_caching:
            return []
        count = (answer.num_tokens - 1) // pool.block_size
        if count > len(answer.block_hashes):
            extend_hashes(answer.block_hashes, answer.tokens, pool.block_size, count)
        return pool.find(islice(answer.block_hashes, count))
