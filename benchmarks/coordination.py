"""What a round costs beside its forwards: python -m benchmarks.coordination --prompts FILE.jsonl

Coordination is a round's time minus the slower side's work in that round (both from the same, contended rounds): the
target's forward, or the draft's steps. Prints it per batch size as a share of the target's forward, medians over the
rounds in which the draft wrote. With --trace and --picture, keeps the rounds as Chrome trace and as a drawing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import ray

from benchmarks.prompts import read_prompts
from pearl_ray import PearlConfig, PearlEngine, SamplingParams
from pearl_ray.core.messages import DraftSummary, RoundSummary


def coordination(rounds: Sequence[RoundSummary], drafts: Sequence[DraftSummary]) -> list[tuple[float, float, float]]:
    """(round, target forward, draft steps) in seconds, of rounds with drafting that another followed at once."""
    by_round = {draft.round: draft for draft in drafts}
    found = []
    for this, following in itertools.pairwise(rounds):
        draft = by_round.get(this.round)
        # A changed batch or an idle time between two rounds isn't a round's cost.
        if draft is None or draft.num_steps < 2 or following.epoch != this.epoch:
            continue
        found.append((following.started - this.started, this.forward_s, draft.forward_s))
    return found


def draw(rounds: Sequence[RoundSummary], drafts: Sequence[DraftSummary], path: Path) -> None:
    """Both sides' work over time, a bar per round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first = rounds[0].started
    figure, axes = plt.subplots(figsize=(10, 2.4))
    target = [((r.started - first) * 1e3, r.forward_s * 1e3) for r in rounds]
    draft = [((d.started - first) * 1e3, d.forward_s * 1e3) for d in drafts]
    axes.broken_barh(target, (1.1, 0.8), facecolors="#3b6fb6", edgecolor="white")
    axes.broken_barh(draft, (0.1, 0.8), facecolors="#d98032", edgecolor="white")
    axes.set_yticks([0.5, 1.5], ["draft writes", "target verifies"])
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    print(f"{'batch':>5} {'rounds':>6} {'round ms':>9} {'target ms':>9} {'draft ms':>9} {'coordination / target':>22}")
    for batch in (1, 8):
        config = PearlConfig(num_speculative_tokens=args.window, max_num_seqs=batch, device="cpu")
        with PearlEngine(config) as engine:
            prompts = read_prompts(args.prompts, batch if batch > 1 else 2, engine.tokenizer)
            engine.generate(prompts, params)
            rounds, drafts = ray.get(engine.coordinator.rounds.remote())
            if batch == 1 and args.trace is not None:
                args.trace.write_text(json.dumps(engine.trace()))
        if batch == 1 and args.picture is not None:
            shown = rounds[10:20]
            during = [d for d in drafts if shown[0].round <= d.round <= shown[-1].round]
            draw(shown, during, args.picture)
        found = coordination(rounds, drafts)
        period, forward, steps = (statistics.median(column) for column in zip(*found, strict=True))
        over = statistics.median((p - max(f, s)) / f for p, f, s in found)
        print(
            f"{batch:>5} {len(found):>6} {period * 1e3:>9.1f} {forward * 1e3:>9.1f} {steps * 1e3:>9.1f} {over:>21.1%}"
        )


if __name__ == "__main__":
    main()
