"""The coordinator's mind: requests, admission, preemption, windows, stops. A plain object without I/O.

It learns of rounds from summaries, a moment after they happened, and answers with diffs that take effect at a later
round; between the two the shards run on by themselves. Knows nothing of Ray, sockets, models or wall clocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pearl_ray.core.blocks import BlockPool
from pearl_ray.core.errors import ConfigError, QueueFullError, ReplicaDivergedError, RequestRefusedError
from pearl_ray.core.messages import (
    Change,
    DraftSummary,
    PlanDiff,
    RoundSummary,
    SequenceSummary,
    SetWindow,
)
from pearl_ray.core.params import SamplingParams, Verification
from pearl_ray.core.phases import Commit, Node, Phase
from pearl_ray.core.replica import Replica
from pearl_ray.core.requests import Answer, Request, Update, make_request
from pearl_ray.core.residents import Residents, Running
from pearl_ray.core.rng import entropy_seed, request_seed
from pearl_ray.core.schedule import Limits, Work
from pearl_ray.core.statistics import Statistics
from pearl_ray.core.windows import WindowPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerConfig:
    """What bounds admission; tokens and sequences."""

    limits: Limits
    block_size: int
    max_num_seqs: int
    max_model_len: int
    max_waiting_requests: int | None
    verification: Verification
    eos_token_ids: frozenset[int]
    vocab_size: int
    seed: int | None


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
    ) -> None:
        self.config = config
        self.replica = Replica(config.limits, config.block_size)
        self.windows = windows
        self.statistics = Statistics()
        self.requests: dict[str, Request] = {}
        self._residents = Residents(target_pool, draft_pool)
        self._decode = decode
        self._clock = clock
        self._waiting: deque[Answer] = deque()
        self._changes: list[Change] = []
        self._in_flight: deque[PlanDiff] = deque()
        self._epoch = 0
        self._num_requests = 0
        self._touched: dict[int, Answer] = {}

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
        while self.replica.epoch < summary.epoch:
            self.replica.apply(self._in_flight.popleft())
        plan = self.replica.plan()
        if self.replica.checksum() != summary.checksum or len(plan.works) != len(summary.sequences):
            raise ReplicaDivergedError(f"round {summary.round}: coordinator and target disagree about the batch")
        phases = [self.replica.sequences[work.seq_id].state.phase for work in plan.works]
        drafted = [_nodes(entry.drafted) for entry in summary.sequences]
        verdicts = [(entry.num_accepted, entry.token) for entry in summary.sequences]
        commits = self.replica.advance(plan, drafted, verdicts)
        self.statistics.count_round(summary)
        for work, entry, phase, commit in zip(plan.works, summary.sequences, phases, commits, strict=True):
            running = self._residents.running.get(work.seq_id)
            if running is not None:  # else: it has left, and what it still did is dropped
                self._take(running, work, entry, phase, commit)
        self._provide()
        self._admit()
        self._choose_windows()
        self.windows.observe_target(summary.num_target_rows, summary.forward_s)

    def on_draft(self, summary: DraftSummary) -> None:
        """Learn what the draft's steps cost."""
        self.statistics.count_draft(summary)
        self.windows.observe_draft(len(self._residents.running), summary.num_steps, summary.forward_s)

    def _take(self, running: Running, work: Work, entry: SequenceSummary, phase: Phase, commit: Commit) -> None:
        answer = running.answer
        state = self.replica.sequences[work.seq_id].state
        if phase is not Phase.PREFILL and work.num_rows:
            answer.num_target_forwards += 1
            answer.rounds[phase.value] = answer.rounds.get(phase.value, 0) + 1
            answer.num_drafted += work.num_drafted
            answer.num_accepted += entry.num_accepted
            self.windows.observe(running.acceptance, work.num_tested, entry.num_accepted)
            self.statistics.count_tests(work, entry)
        for position, logprobs in enumerate(entry.prompt_logprobs, entry.prompt_start):
            answer.request.prompt_logprobs.setdefault(position, logprobs)
        if not commit.tokens:
            self._keep(running)
            return
        before = len(answer.token_ids)
        answer.commit(commit, entry.logprobs)
        self.statistics.generation_tokens += len(answer.token_ids) - before
        self._touched[id(answer)] = answer
        request = answer.request
        if request.first_token_at is None:
            request.first_token_at = self._clock()
        if answer.finish_reason is not None:
            self._keep(running)
            self._leave(answer)
            if request.finished:
                self._finish(request)
        elif (state.num_committed - 1) % self.config.block_size < len(commit.tokens):
            self._keep(running)

    def _keep(self, running: Running) -> None:
        """Make the blocks findable that lie wholly below C − 1 and are written."""
        sequence = self.replica.sequences[running.seq_id]
        running.keep_committed(sequence.tokens, sequence.state)

    def _leave(self, answer: Answer) -> None:
        """Take an answer out of the batch or the queue."""
        if answer.seq_id is None:
            self._waiting = deque(other for other in self._waiting if other is not answer)
        else:
            self._changes.append(self._residents.leave(answer))
        self._touched[id(answer)] = answer

    def _finish(self, request: Request) -> None:
        request.finished_at = self._clock()
        del self.requests[request.request_id]
        self.statistics.count_finished(request)

    # -- admission --------------------------------------------------------------------------------------------------

    def _provide(self) -> None:
        """Extend the running sequences' blocks, the oldest first; preempt the youngest where there are none left."""
        for running in self._residents.by_age():
            while running.seq_id in self._residents.running and not self._extend(running):
                self._preempt(self._residents.by_age()[-1])

    def _extend(self, running: Running) -> bool:
        sequence = self.replica.sequences.get(running.seq_id)
        committed = sequence.state.num_committed if sequence is not None else len(running.answer.tokens)
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
        self._waiting.appendleft(answer)
        self.statistics.preemptions += 1

    def _admit(self) -> None:
        """Let waiting answers join, first come first served, while there is room."""
        residents = self._residents
        while self._waiting and len(residents.running) < self.config.max_num_seqs:
            answer = self._waiting[0]
            window = self._window_for(answer, self.windows.first_window(len(residents.running) + 1))
            if not residents.can_join(answer, window):
                break
            self._waiting.popleft()
            self._changes.append(residents.join(answer, window))

    def _choose_windows(self) -> None:
        chosen = self.windows.choose(
            {seq_id: running.acceptance for seq_id, running in self._residents.running.items()}
        )
        for seq_id, running in self._residents.running.items():
            window = self._window_for(running.answer, chosen[seq_id])
            if running.window != window:
                running.window = window
                self._changes.append(SetWindow(running.seq_id, window))

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


def _nodes(tokens: Sequence[int]) -> tuple[Node, ...]:
    return tuple(Node(token, index - 1) for index, token in enumerate(tokens))
