"""What a round costs in Python beside the models: python -m benchmarks.bookkeeping

A batch of fake sequences with random verdicts, PEARL. Prints microseconds per sequence and round of the
two places that do bookkeeping: a shard (plan, transition, checksum; it runs behind a forward) and the coordinator
(summary, commits, stops, blocks, windows, updates; it runs beside the rounds). Medians over the rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from pearl_ray.core.blocks import BlockPool
from pearl_ray.core.controller import Controller, ControllerConfig
from pearl_ray.core.messages import RoundSummary, SequenceSummary, decode, encode
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Node
from pearl_ray.core.replica import Replica
from pearl_ray.core.schedule import Limits
from pearl_ray.core.windows import StepCosts, WindowPolicy

COSTS = StepCosts({1: 0.01, 1024: 0.01}, {1: 0.002, 256: 0.002})


def measure(batch: int, rounds: int, acceptance: float) -> tuple[float, float]:
    """Median seconds per sequence and round: (shard, coordinator)."""
    draw = random.Random(0)
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
    pools = [BlockPool(batch * 64, 16, prefix_caching=True) for _ in range(2)]
    policy = WindowPolicy("pearl", None, COSTS)
    controller = Controller(config, pools[0], pools[1], policy, lambda ids: " word" * len(ids), time.monotonic)
    params = SamplingParams(max_tokens=900, ignore_eos=True, stop=("never",))
    for number in range(batch):
        controller.submit(f"r{number}", None, [number + 1] * 8, params)
    shard = Replica(limits, 16)
    in_shard, in_coordinator = [], []
    for number in range(rounds):
        diff = controller.take_diff()
        began = time.perf_counter()
        if diff is not None:
            shard.apply(diff)
        plan = shard.plan()
        epoch, checksum = shard.epoch, shard.checksum()
        planned = time.perf_counter() - began
        drafted = [tuple(Node(7, i - 1) for i in range(work.num_drafted)) for work in plan.works]
        verdicts = []
        for work in plan.works:
            right = next((i for i in range(work.num_tested) if draw.random() > acceptance), work.num_tested)
            verdicts.append((right, 9 if right < work.num_rows else -1))
        began = time.perf_counter()
        shard.advance(plan, drafted, verdicts)
        sequences = [
            SequenceSummary(work.seq_id, [node.token for node in nodes], *verdict)
            for work, nodes, verdict in zip(plan.works, drafted, verdicts, strict=True)
        ]
        rows = plan.num_target_rows
        payload = encode(RoundSummary(number, epoch, checksum, sequences, 0.0, 0.0, 0.01, 0.0, rows))
        in_shard.append((planned + time.perf_counter() - began) / batch)
        began = time.perf_counter()
        summary = decode(payload)
        assert isinstance(summary, RoundSummary)
        controller.on_round(summary)
        controller.take_updates()
        in_coordinator.append((time.perf_counter() - began) / batch)
    return statistics.median(in_shard[5:]), statistics.median(in_coordinator[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--acceptance", type=float, default=0.75)
    args = parser.parse_args()
    print(f"{'sequences':>9} {'shard µs/sequence':>18} {'coordinator µs/sequence':>24}")
    for batch in (32, 64, 128, 256):
        shard, coordinator = measure(batch, args.rounds, args.acceptance)
        print(f"{batch:>9} {shard * 1e6:>18.1f} {coordinator * 1e6:>24.1f}")


if __name__ == "__main__":
    main()
