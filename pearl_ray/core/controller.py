"""The coordinator's mind: requests, admission, preemption, windows, stops. A plain object without I/O.

It learns of rounds from summaries, a moment after they happened, and answers with diffs that take effect at a later
round; between the two the shards run on by themselves. Knows nothing of Ray, sockets, models or wall clocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pearl_ray.core.blocks import BlockPool
from pearl_ray.core.errors import ConfigError, QueueFullError, ReplicaDivergedError, RequestRefusedError
from pearl_ray.core.messages import (
    Change,
    DraftSummary,
    PlanDiff,
    RoundSummary,
    SequenceSummary,
    SetPace,
    SetWindow,
)
from pearl_ray.core.pacing import PacingPolicy
from pearl_ray.core.params import SamplingParams, Verification
from pearl_ray.core.phases import Commit, Node, Phase
from pearl_ray.core.replica import Replica
from pearl_ray.core.requests import Answer, Request, Update, make_request
from pearl_ray.core.residents import SPARE_ROUNDS, Residents, Running
from pearl_ray.core.rng import entropy_seed, request_seed
from pearl_ray.core.schedule import Limits, Pace, RoundPlan
from pearl_ray.core.statistics import Statistics
from pearl_ray.core.waiting import WaitingQueue
from pearl_ray.core.windows import WindowPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerConfig:
    """What bounds admission; tokens and sequences. ``spare_rounds``: see ``residents``."""

    limits: Limits
    block_size: int
    max_num_seqs: int
    max_model_len: int
    max_waiting_requests: int | None
    verification: Verification
    eos_token_ids: frozenset[int]
    vocab_size: int
    seed: int | None
    spare_rounds: int = SPARE_ROUNDS


class Controller:
    """See the module. Call order: :meth:`submit` and :meth:`abort` at any time; :meth:`on_round` per summary; after
    either, :meth:`take_diff` (to send to every shard) and :meth:`take_updates` (to send to clients).
    """

    def __init__(
        self,
        config: ControllerConfig,
        target_pool: BlockPool,
        draft_pool: BlockPool | None,
        windows: WindowPolicy,
        decode: Callable[[list[int]], str],
        clock: Callable[[], float],
        pacing: PacingPolicy | None = None,
    ) -> None:
        """``pacing``: of long prompts' prefill; None: as fast as they go."""
        self.config = config
        self.pacing = pacing
        self.replica = Replica(config.limits, config.block_size)
        self.windows = windows
        self.statistics = Statistics()
        self.requests: dict[str, Request] = {}
        self._residents = Residents(target_pool, draft_pool, config.spare_rounds)
        self._decode = decode
        self._clock = clock
        self._waiting = WaitingQueue()
        self._changes: list[Change] = []
        self._in_flight: deque[PlanDiff] = deque()
        self._epoch = 0
        self._num_requests = 0
        self._touched: dict[int, Answer] = {}
        self._chosen: Mapping[int, int] = {}  # the windows in force or on their way
        self._pace = Pace(config.limits.max_num_batched_tokens)  # in force or on its way
        self._ended = (-2, 0.0)  # the last round with decoding sequences: its number, when it ended
        self._short: list[Running] = []  # who holds fewer blocks than wanted

    # -- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request_id: str, prompt: str | None, prompt_ids: Sequence[int], params: SamplingParams) -> Request:
        """Queue a request.

        Raises:
            RequestRefusedError: it can never be served; the message has the numbers.
            QueueFullError: the queue is at its bound.
        """
        self._check(request_id, prompt_ids, params)
        config = self.config
        self._num_requests += 1
        if params.seed is not None:
            seed = params.seed & (2**64 - 1)
        elif config.seed is not None:
            seed = request_seed(config.seed, self._num_requests)
        else:
            seed = entropy_seed()
        request = make_request(
            request_id,
            prompt,
            prompt_ids,
            params,
            seed=seed,
            rejection=(params.verification or config.verification) == "rejection",
            eos_token_ids=config.eos_token_ids,
            max_total=self._longest(len(prompt_ids), params),
            decode=self._decode,
            now=self._clock(),
        )
        self.requests[request_id] = request
        self._waiting.extend(request.answers)
        self.statistics.prompt_tokens += len(request.prompt_ids)
        self._admit()
        return request

    def _check(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        config = self.config
        if request_id in self.requests:
            raise RequestRefusedError(f"request_id={request_id!r} is in use by a running request")
        if not prompt_ids:
            raise RequestRefusedError("the prompt is empty; give at least one token")
        highest = max(prompt_ids)
        if highest >= config.vocab_size or min(prompt_ids) < 0:
            raise RequestRefusedError(f"prompt token {highest} is outside the vocabulary of {config.vocab_size} tokens")
        if len(prompt_ids) >= config.max_model_len:
            raise RequestRefusedError(
                f"the prompt has {len(prompt_ids)} tokens and max_model_len is {config.max_model_len}; "
                "shorten the prompt (one token at least must be left for the answer)"
            )
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            if any(token >= config.vocab_size for token in ids):
                raise ConfigError(name, getattr(params, name), f"token ids below {config.vocab_size}")
        room = self._residents.room
        if self._longest(len(prompt_ids), params) > room or len(prompt_ids) >= room:
            total = len(prompt_ids) + (params.max_tokens or 1)
            raise RequestRefusedError(
                f"the request needs a cache of {total} tokens (prompt and max_tokens) and there are {room}; "
                "lower max_tokens or raise kv_cache_blocks"
            )
        limit = config.max_waiting_requests
        if limit is not None and len(self._waiting) + params.n > limit and not self._has_room(params.n):
            raise QueueFullError(
                f"{len(self._waiting)} sequences wait and max_waiting_requests is {limit}; retry later"
            )

    def _longest(self, num_prompt: int, params: SamplingParams) -> int:
        """Tokens, prompt included, at which an answer ends; without max_tokens it may take all there is."""
        if params.max_tokens is None:
            return min(self.config.max_model_len, self._residents.room)
        return min(num_prompt + params.max_tokens, self.config.max_model_len)

    def _has_room(self, count: int) -> bool:
        return not self._waiting and len(self._residents.running) + count <= self.config.max_num_seqs

    def abort(self, request_id: str) -> bool:
        """End a request where it is; its blocks are free at the next round. False if it isn't running."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        for answer in request.answers:
            if answer.finish_reason is None:
                answer.abort()
                self._leave(answer)
        self._finish(request)
        self._admit()
        return True

    # -- rounds -----------------------------------------------------------------------------------------------------

    def on_round(self, summary: RoundSummary) -> None:
        """Repeat a round that the shards have done, then decide what changes.

        Raises:
            ReplicaDivergedError: the shards did something else than this replica would.
        """
        replica, running = self.replica, self._residents.running
        while replica.epoch < summary.epoch:
            replica.apply(self._in_flight.popleft())
        plan = replica.plan()
        if replica.checksum() != summary.checksum or len(plan.works) != len(summary.sequences):
            raise ReplicaDivergedError(f"round {summary.round}: coordinator and target disagree about the batch")
        before = [replica.sequences[work.seq_id].state for work in plan.works]
        drafted = [tuple(map(Node, entry.drafted)) for entry in summary.sequences]
        verdicts = [(entry.num_accepted, entry.token) for entry in summary.sequences]
        commits = replica.advance(plan, drafted, verdicts)
        self.statistics.count_round(summary)
        num_drafted, num_accepted, made = [], [], 0
        for work, entry, state, commit in zip(plan.works, summary.sequences, before, commits, strict=True):
            member = running.get(work.seq_id)
            if member is None:
                continue  # it has left, and what it still did is dropped
            if work.num_rows and state.is_decoding:
                made += member.count_round(state, work, entry.num_accepted)
                num_drafted.append(work.num_drafted)
                num_accepted.append(entry.num_accepted)
            self._take(member, entry, commit)
        self.statistics.count_verdicts(num_drafted, num_accepted)
        self.windows.observe_round(made, sum(num_accepted))
        if plan.num_decoding:
            self._observe_round(plan, summary)
        self._provide()
        self._admit()
        self._choose_windows()

    def on_draft(self, summary: DraftSummary) -> None:
        """Learn what the draft's steps cost."""
        self.statistics.count_draft(summary)
        num_running = len(self._residents.running)
        costs = self.windows.costs
        if costs is None or summary.num_fed > 2 * num_running:
            return  # prompts, or what the draft had missed
        seconds = summary.forward_s + summary.advance_s  # all that stands between a verdict and the next window
        costs.observe_draft(num_running, summary.num_steps, seconds)

    def _take(self, running: Running, entry: SequenceSummary, commit: Commit) -> None:
        """Give an answer what was committed."""
        answer = running.answer
        if entry.prompt_logprobs:
            for position, logprobs in enumerate(entry.prompt_logprobs, entry.prompt_start):
                answer.request.prompt_logprobs.setdefault(position, logprobs)
        num_new = len(commit.tokens)
        if not num_new:
            self._keep(running)
            return
        request = answer.request
        if request.first_token_at is None:
            request.first_token_at = self._clock()
        self.statistics.generation_tokens += answer.commit(commit, entry.logprobs or ())
        self._touched[id(answer)] = answer
        if answer.finish_reason is not None:
            self._keep(running)
            self._leave(answer)
            if request.finished:
                self._finish(request)
            return
        total = answer.num_tokens
        if (total - 1) % self.config.block_size < num_new:
            self._keep(running)
        if total > running.enough_until:
            self._short.append(running)

    def _keep(self, running: Running) -> None:
        """Make the blocks findable that lie wholly below C − 1 and are written."""
        sequence = self.replica.sequences[running.seq_id]
        running.keep_committed(sequence.tokens, sequence.state)

    def _leave(self, answer: Answer) -> None:
        """Take an answer out of the batch or the queue."""
        if answer.seq_id is None:
            self._waiting.remove(answer)
        else:
            self._changes.append(self._residents.leave(answer))
        self._touched[id(answer)] = answer

    def _finish(self, request: Request) -> None:
        request.finished_at = self._clock()
        del self.requests[request.request_id]
        self.statistics.count_finished(request)

    # -- admission --------------------------------------------------------------------------------------------------

    def _provide(self) -> None:
        """Extend the blocks of those short of them, oldest first; preempt the youngest where there are none left."""
        short, self._short = self._short, []
        for running in self._residents.by_age(short):
            while running.seq_id in self._residents.running and not self._extend(running):
                self._preempt(self._residents.by_age()[-1])

    def _extend(self, running: Running) -> bool:
        committed = running.answer.num_tokens
        if not self._residents.can_extend(running, committed):
            return False
        change = self._residents.extend(running, committed)
        if change is not None:
            self._changes.append(change)
        return True

    def _preempt(self, running: Running) -> None:
        """Put a sequence back in front of the queue; its committed tokens are fed again later, never drawn again."""
        answer = running.answer
        self._leave(answer)
        self._waiting.put_back(answer)
        self.statistics.preemptions += 1

    def _admit(self) -> None:
        """Let waiting answers join while there is room, in the queue's order."""
        residents = self._residents
        while self._waiting and len(residents.running) < self.config.max_num_seqs:
            first = self.windows.first_window(len(residents.running) + 1)

            def fits(answer: Answer, first: int = first) -> bool:
                return residents.can_join(answer, self._window_for(answer, first))

            answer = self._waiting.take(fits, self.statistics.num_rounds)
            if answer is None:
                break
            self._changes.append(residents.join(answer, self._window_for(answer, first)))

    def _choose_windows(self) -> None:
        chosen = self.windows.choose(self._residents.acceptances)
        if chosen is self._chosen:
            return
        self._chosen = chosen
        for seq_id, running in self._residents.running.items():
            window = self._window_for(running.answer, chosen[seq_id])
            if running.window != window:
                running.set_window(window)
                if running.answer.num_tokens > running.enough_until:
                    self._short.append(running)
                self._changes.append(SetWindow(running.seq_id, window))

    def _observe_round(self, plan: RoundPlan, summary: RoundSummary) -> None:
        """Learn what a round with decoding sequences took, the host's part too: from the end of the round before."""
        (number, ended), self._ended = self._ended, (summary.round, summary.finished)
        # Where the round before was another kind, there was perhaps no work before it.
        seconds = summary.finished - ended if number == summary.round - 1 else 0.0
        costs = self.windows.costs
        if costs is not None and (plan.prefill is None or plan.prefill.rests):
            drafted = [work.num_drafted for work in plan.works]
            num_idle = drafted.count(0)
            costs.observe_target(summary.num_target_rows, summary.forward_s)
            costs.observe_gap(sum(drafted) + num_idle, summary.gap_s)
            if costs.shares_device and plan.prefill is None and not summary.through_host and not _catches_up(plan):
                costs.observe_round(summary.num_target_rows, len(drafted) - num_idle, max(drafted), seconds)
        if self.pacing is not None and seconds:
            self._choose_pace(self.pacing, plan, seconds)

    def _choose_pace(self, pacing: PacingPolicy, plan: RoundPlan, seconds: float) -> None:
        pace = pacing.observe(seconds, plan.num_decoding, plan.prefill)
        if pace != self._pace:
            self._pace = pace
            self._changes.append(SetPace(pace.tokens, pace.every))

    def _window_for(self, answer: Answer, chosen: int) -> int:
        """The request's own window, or the one chosen for it."""
        own = answer.request.params.num_speculative_tokens
        return chosen if own is None or self.config.limits.mode == "ar" else own

    # -- what goes out ----------------------------------------------------------------------------------------------

    def take_diff(self) -> PlanDiff | None:
        """The decisions since the last call; to be sent to every shard."""
        if not self._changes:
            return None
        self._epoch += 1
        diff = PlanDiff(self._epoch, self._changes)
        self._changes = []
        self._in_flight.append(diff)
        return diff

    def take_updates(self) -> list[Update]:
        """New tokens and endings since the last call."""
        touched, self._touched = self._touched, {}
        updates = (answer.take_update(answer.request.request_id) for answer in touched.values())
        return [update for update in updates if update is not None]

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._residents.running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    def snapshot(self) -> dict[str, object]:
        """Gauges for the metrics: pools, phases, windows."""
        pools = self._residents.usage()
        phases = {phase.value: 0 for phase in Phase}
        for sequence in self.replica.sequences.values():
            phases[sequence.state.phase.value] += 1
        window = max((running.window for running in self._residents.running.values()), default=0)
        return {"pools": pools, "phases": phases, "window_tokens": window}


def _catches_up(plan: RoundPlan) -> bool:
    """Whether the draft feeds what it had missed: more than two tokens for each sequence."""
    return sum([work.draft_fed for work in plan.works]) > 2 * len(plan.works)
