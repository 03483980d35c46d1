"""What a round costs in Python beside the models: python -m benchmarks.bookkeeping

A batch of fake sequences with random verdicts, PEARL, each with a stop string. Prints CPU microseconds (process time,
so that others at work on the machine count little) per sequence and round of the two places that do bookkeeping: a
shard (plan, checksum, transition, encoded summary; it runs behind a forward) and the coordinator (decoded summary,
commits, text, stops, blocks, windows, updates; it runs beside the rounds). Each figure is the mean over rounds that
follow one another, two reviews of the windows and the garbage collections among them included, and the least of all
such groups in several runs.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence

from pearl_ray.core.blocks import BlockPool
from pearl_ray.core.controller import Controller, ControllerConfig
from pearl_ray.core.costs import StepCosts
from pearl_ray.core.messages import RoundSummary, SequenceSummary, decode, encode
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Node
from pearl_ray.core.replica import Replica
from pearl_ray.core.schedule import Limits, Work
from pearl_ray.core.windows import REVIEW_ROUNDS, WindowPolicy

COSTS = StepCosts({1: 0.01, 1024: 0.01}, {1: 0.002, 256: 0.002})
WARM_UP = 5  # rounds before the clock runs: prefill, the first windows
GROUP = 2 * REVIEW_ROUNDS
Decode = Callable[[list[int]], str]


def words(ids: list[int]) -> str:
    """Five characters per token, at next to no cost."""
    return " word" * len(ids)


class FakeRounds:
    """A coordinator and a shard without models, at work on ``batch`` sequences; ``acceptance`` of each drafted token.

    Attributes:
        shard_s, coordinator_s: CPU seconds spent so far.
    """

    def __init__(self, batch: int, acceptance: float = 0.75, text_of: Decode = words, stop: Sequence[str] = ()) -> None:
        limits = Limits("pearl", 8192)
        config = ControllerConfig(
            limits=limits,
            block_size=16,
            max_num_seqs=batch,
            max_model_len=4096,
            max_waiting_requests=None,
            verification="coupled",
            eos_token_ids=frozenset({0}),
            vocab_size=50_000,
            seed=0,
        )
        pools = [BlockPool(batch * 256, 16, prefix_caching=True) for _ in range(2)]
        policy = WindowPolicy("pearl", None, COSTS)
        self.controller = Controller(config, pools[0], pools[1], policy, text_of, time.monotonic)
        self.shard = Replica(limits, 16)
        self.shard_s = self.coordinator_s = 0.0
        self.number = 0
        self._acceptance = acceptance
        self._draw = random.Random(0)
        params = SamplingParams(max_tokens=4000, ignore_eos=True, stop=tuple(stop))
        for number in range(batch):
            self.controller.submit(f"r{number}", None, [number + 1] * 8, params)

    def round(self) -> None:
        """One round of the shard, and the coordinator's hearing of it."""
        shard, diff = self.shard, self.controller.take_diff()
        began = time.process_time()
        if diff is not None:
            shard.apply(diff)
        plan = shard.plan()
        epoch, checksum = shard.epoch, shard.checksum()
        planned = time.process_time() - began
        drafted = [tuple(Node(self._token()) for _ in range(work.num_drafted)) for work in plan.works]
        verdicts = [self._verdict(work) for work in plan.works]
        began = time.process_time()
        shard.advance(plan, drafted, verdicts)
        sequences = [
            SequenceSummary(work.seq_id, [node.token for node in nodes], *verdict)
            for work, nodes, verdict in zip(plan.works, drafted, verdicts, strict=True)
        ]
        rows = plan.num_target_rows
        payload = encode(RoundSummary(self.number, epoch, checksum, sequences, 0.0, 0.0, 0.01, 0.0, rows))
        self.shard_s += planned + time.process_time() - began
        self.number += 1
        self.hear(payload)

    def hear(self, payload: bytes) -> None:
        """The coordinator's part."""
        began = time.process_time()
        summary = decode(payload)
        assert isinstance(summary, RoundSummary)
        self.controller.on_round(summary)
        self.controller.take_updates()
        self.coordinator_s += time.process_time() - began

    def _token(self) -> int:
        return self._draw.randrange(1, 40_000)

    def _verdict(self, work: Work) -> tuple[int, int]:
        tests = range(work.num_tested)
        accepted = next((i for i in tests if self._draw.random() > self._acceptance), work.num_tested)
        return accepted, self._token() if accepted < work.num_rows else -1


def measure(batch: int, rounds: int, acceptance: float, text_of: Decode, stop: Sequence[str]) -> tuple[float, float]:
    """CPU seconds per sequence and round, the least of the means of ``GROUP`` rounds: (shard, coordinator)."""
    fake = FakeRounds(batch, acceptance, text_of, stop)
    for _ in range(WARM_UP):
        fake.round()
    in_shard, in_coordinator = [], []
    for _ in range(max(rounds // GROUP, 1)):
        fake.shard_s = fake.coordinator_s = 0.0
        for _ in range(GROUP):
            fake.round()
        in_shard.append(fake.shard_s / GROUP / batch)
        in_coordinator.append(fake.coordinator_s / GROUP / batch)
    return min(in_shard), min(in_coordinator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--acceptance", type=float, default=0.75)
    parser.add_argument("--stop", default="never", help="a stop string that does not come; '' for none")
    parser.add_argument("--tokenizer", help="a model whose tokenizer makes the text, instead of a fake one")
    args = parser.parse_args()
    text_of: Decode = words
    if args.tokenizer is not None:
        from pearl_ray.model.tokenizer import load_tokenizer

        text_of = load_tokenizer(args.tokenizer, offline=True).decode
    stop = (args.stop,) if args.stop else ()
    print(f"CPU µs per sequence and round: least mean of {GROUP} rounds, in {args.repeats} runs of {args.rounds}")
    print(f"{'sequences':>9} {'shard':>8} {'coordinator':>12} {'sum':>8}")
    for batch in (32, 64, 128, 256):
        runs = [measure(batch, args.rounds, args.acceptance, text_of, stop) for _ in range(args.repeats)]
        shard, coordinator = (min(run[side] for run in runs) * 1e6 for side in (0, 1))
        print(f"{batch:>9} {shard:>8.1f} {coordinator:>12.1f} {shard + coordinator:>8.1f}")


if __name__ == "__main__":
    main()
