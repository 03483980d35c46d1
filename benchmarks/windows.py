"""Windows chosen by the policy against fixed ones, replayed: python -m benchmarks.windows --prompts F [F …]

Who agrees where is read off the embedded pair once (the target's greedy texts in float32, the draft teacher-forced on
them; it takes minutes, and ``--traces`` keeps it). Then batches of such texts go through ``transition`` round by round,
without models, each round as long as a machine takes for it: the steps of docs/performance.md, run E, and on a shared
device turns that roughly make up the rounds measured there. Prints the best fixed window's tokens per second over AR's,
the policy's over AR's, and over the best fixed window's.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.main_job import answer, greedy, texts_of
from benchmarks.prompts import read_prompts
from benchmarks.reference import hugging_face, teacher_forced
from pearl_ray import env
from pearl_ray.core.costs import StepCosts
from pearl_ray.core.phases import Node, Round, SequenceState, transition
from pearl_ray.core.windows import Acceptance, WindowPolicy
from pearl_ray.model.loading import model_path
from pearl_ray.model.tokenizer import load_tokenizer

LONGEST_PROMPT = 1500
FIXED = (0, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20)
LATE = 2  # rounds from the one after a choice to the one in which it holds, as where rounds are queued ahead
NUM_PROMPT = 1  # tokens; what a replayed prompt says doesn't matter
Taken = Callable[[int, int, int], float]  # rows, sequences that draft, draft steps: milliseconds of a round

LARGE = StepCosts({1: 15.8, 8: 16.9, 32: 17.3, 64: 17.6, 128: 19.0, 256: 24.0}, {1: 0.69, 8: 1.07, 32: 1.25})
SMALL = StepCosts({1: 5.4, 8: 5.8, 32: 6.0, 64: 6.6, 128: 7.5, 256: 11.0}, {1: 0.82, 8: 1.17, 32: 1.5})


def apart(costs: StepCosts) -> Taken:
    """Draft and target on devices of their own."""
    return lambda rows, drafting, steps: max(costs.target(rows), steps * costs.draft(drafting))


def in_turns(costs: StepCosts, per_round: float, per_step: float, free_steps: int) -> Taken:
    """Both on one: their sum, something for each round with drafting, and for each step behind the first few."""

    def taken(rows: int, drafting: int, steps: int) -> float:
        turns = per_round + per_step * max(steps - free_steps, 0) if steps else 0.0
        return costs.target(rows) + steps * costs.draft(drafting) + turns

    return taken


MACHINES: dict[str, tuple[StepCosts, bool, Taken]] = {
    "H200, 32B, apart": (LARGE, False, apart(LARGE)),
    "H100, 8B, apart": (SMALL, False, apart(SMALL)),
    "H200, 32B, shared": (LARGE, True, in_turns(LARGE, 1.5, 2.5, 4)),
    "H100, 8B, shared": (SMALL, True, in_turns(SMALL, 2.4, 0.2, 0)),
}


@dataclass(slots=True)
class Text:
    """A text on its way: who agrees at each of its tokens, and where it stands."""

    agrees: Sequence[bool]
    state: SequenceState
    acceptance: Acceptance = field(default_factory=Acceptance)

    def step(self, drafts: int) -> tuple[int, int, int]:
        """A round: (rows, tested, accepted)."""
        state = self.state
        nodes = len(state.pending) + drafts
        rows = min(len(state.pending) + 1, state.max_total - state.num_committed)
        tested = min(nodes, rows)
        right = self.agrees[state.num_committed - NUM_PROMPT :][:tested]
        accepted = right.index(False) if False in right else tested
        fed = state.num_committed + len(state.pending) - state.draft_kv if drafts else 0
        event = Round(rows, fed, (Node(0),) * drafts, tested, accepted, 0 if accepted < rows else -1)
        self.state, _ = transition(state, event)
        return rows, tested, accepted


def replay(traces: Sequence[Sequence[bool]], batch: int, machine: str, window: int | None, passes: int = 3) -> float:
    """Tokens per second of a batch that texts join as others end; ``window`` None: the policy's."""
    costs, is_shared, taken = MACHINES[machine]
    order = random.Random(0)
    waiting = [t for _ in range(passes * (1 + batch // len(traces))) for t in order.sample(traces, len(traces))]
    policy = WindowPolicy("pearl", window, costs, shares_device=is_shared)
    running: dict[int, Text] = {}
    windows: dict[int, int] = {}
    on_their_way: deque[Mapping[int, int]] = deque([{}] * LATE)
    num_tokens, milliseconds, next_id = 0, 0.0, 0
    while waiting or len(running) == batch:
        while waiting and len(running) < batch:
            agrees = waiting.pop()
            total = NUM_PROMPT + len(agrees)
            windows[next_id] = policy.first_window(len(running) + 1)
            running[next_id] = Text(agrees, SequenceState(NUM_PROMPT, NUM_PROMPT + 1, total, 0, (), NUM_PROMPT))
            next_id += 1
        rows = made = accepted = 0
        drafted = []
        for key, text in running.items():
            state = text.state
            left = state.max_total - state.num_committed - len(state.pending)
            drafts = min(windows[key], left)
            before = state.num_committed
            fed, tested, passed = text.step(drafts)
            rows, accepted, made = rows + fed, accepted + passed, made + text.acceptance.observe(tested, passed)
            num_tokens += text.state.num_committed - before
            drafted.append(drafts)
        steps, drafting = max(drafted), len(drafted) - drafted.count(0)
        took = taken(rows, drafting, steps)
        milliseconds += took
        policy.observe_round(made, accepted)
        if policy.costs is not None:
            policy.costs.observe_round(rows, drafting, steps, took)
        running = {key: text for key, text in running.items() if not text.state.is_full}
        on_their_way.append(policy.choose({key: text.acceptance for key, text in running.items()}))
        chosen = on_their_way.popleft()
        windows = {key: chosen.get(key, windows[key]) for key in running}
    return 1000 * num_tokens / milliseconds


def traces_of(files: Sequence[Path], count: int, num_tokens: int) -> list[list[bool]]:
    """Per prompt: at which tokens of the target's greedy text the draft would have said the same."""
    tokenizer = load_tokenizer(model_path("target", None, str(env.cache_dir())))
    prompts = [p for file in files for p in read_prompts(file, count, tokenizer) if len(p) <= LONGEST_PROMPT]
    texts = texts_of(answer(prompts, greedy(len(prompts), num_tokens), 16, mode="ar", max_model_len=2048))
    draft = hugging_face("draft", None, None)
    guesses = [teacher_forced(draft, p, text).argmax(-1).tolist() for p, text in zip(prompts, texts, strict=True)]
    return [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(guesses, texts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", default=[])
    parser.add_argument("--count", type=int, default=14, help="prompts of each file")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--traces", type=Path, help="a file to keep who agrees where; read where it is there")
    args = parser.parse_args()
    if args.traces is not None and args.traces.exists():
        traces = json.loads(args.traces.read_text())
    else:
        traces = traces_of(args.prompts, args.count, args.tokens)
        if args.traces is not None:
            args.traces.write_text(json.dumps(traces))
    traces = [trace for trace in traces if len(trace) > 20]
    agreement = torch.tensor([sum(trace[1:]) / (len(trace) - 1) for trace in traces])
    print(f"{len(traces)} texts; agreement {agreement.mean():.3f}, from {agreement.min():.2f} to {agreement.max():.2f}")
    print(f"{'machine':>18} {'batch':>5} {'best fixed':>10} {'over AR':>8} {'policy / AR':>11} {'policy / best':>13}")
    for machine in MACHINES:
        for batch in (1, 8, 32):
            speeds = {window: replay(traces, batch, machine, window) for window in FIXED}
            best = max(speeds, key=lambda window: speeds[window])
            chosen = replay(traces, batch, machine, None)
            ratios = (speeds[best] / speeds[0], chosen / speeds[0], chosen / speeds[best])
            print(f"{machine:>18} {batch:>5} {best:>10} {ratios[0]:>8.2f} {ratios[1]:>11.2f} {ratios[2]:>13.3f}")


if __name__ == "__main__":
    main()
