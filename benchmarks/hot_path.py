"""Rounds at the speed of the hardware, or what keeps them from it: correctness, then pieces, then whole rounds.

    python -m benchmarks.hot_path --target MODEL --draft MODEL --prompts FILE.jsonl
        [--batches 1,8,32] [--tokens 128] [--windows 4,8] [--only correctness,rounds,sd,pieces] [--colocate]
        [--profile] [--json FILE] [--every-round FILE]

MODEL as for ``pearl-ray serve``; a small pair in a large shape is made by ``benchmarks.scaled_checkpoint``. Everything
is greedy and runs past the end of text, so that a batch keeps its size. Rounds are read from what the shards report of
each: a round's time is from one verdict to the next, medians over rounds whose batch didn't change. On a CPU it
rehearses at tiny shapes; the ratios mean something on GPUs only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ray
import torch

from benchmarks.hot_pieces import copy_bandwidth, pieces
from benchmarks.hot_texts import compare
from benchmarks.prompts import read_prompts
from pearl_ray import PearlConfig, PearlEngine, SamplingParams
from pearl_ray.commands.status import rows as figures_of
from pearl_ray.core.messages import DraftSummary, RoundSummary

HEAD = "batch    mode rounds  rows  round ms target ms  draft ms  wait ms   gap us  /slower  tokens/s /forward"


class Rounds(NamedTuple):
    """Medians over steady rounds, in milliseconds, and what they committed."""

    count: int
    period: float
    target: float
    draft: float
    wait: float
    gap: float
    slower: float
    rows: float
    tokens_per_s: float
    tokens_per_forward: float


def steady(rounds: Sequence[RoundSummary], drafts: Sequence[DraftSummary], batch: int) -> Rounds | None:
    """Of rounds in which ``batch`` sequences decoded, each followed at once by another such."""
    by_round = {draft.round: draft for draft in drafts}
    found, tokens, seconds = [], 0, 0.0
    for before, this in itertools.pairwise(rounds):
        ids = [sequence.seq_id for sequence in this.sequences]
        if len(ids) != batch or ids != [sequence.seq_id for sequence in before.sequences]:
            continue
        if this.round != before.round + 1 or this.num_target_rows > 2 * sum(len(s.drafted) + 1 for s in this.sequences):
            continue  # a prompt is being fed
        draft = by_round.get(this.round)
        drafting = draft.forward_s + draft.advance_s if draft is not None and draft.num_steps > 1 else 0.0
        period = this.finished - before.finished
        found.append((period, this.forward_s, drafting, this.wait_s, this.gap_s, this.num_target_rows))
        tokens += sum(s.num_accepted + (s.token >= 0) for s in this.sequences)
        seconds += period
    if len(found) < 4:
        return None
    period, target, drafting, wait, gap, rows = (statistics.median(column) for column in zip(*found, strict=True))
    slower = statistics.median(p / max(t, d) for p, t, d, *_ in found)
    per_forward = tokens / (len(found) * batch)
    milliseconds = (1e3 * value for value in (period, target, drafting, wait, gap))
    return Rounds(len(found), *milliseconds, slower, rows, tokens / seconds, per_forward)


def prompts_of(args: argparse.Namespace, engine: PearlEngine, count: int) -> list[list[int]]:
    """``count`` prompts; the file's, again from its start where it has fewer."""
    prompts = read_prompts(args.prompts, count, engine.tokenizer)
    return [prompts[i % len(prompts)] for i in range(count)]


def engine_of(args: argparse.Namespace, mode: str, batch: int) -> PearlEngine:
    """An engine of the two models."""
    config = PearlConfig(
        target_model=args.target,
        draft_model=args.draft,
        mode=mode,
        device=args.device,
        dtype=args.dtype,
        colocate=args.colocate,
        target_tensor_parallel_size=args.target_tp,
        draft_tensor_parallel_size=args.draft_tp,
        num_speculative_tokens=args.window or "auto",
        max_model_len=args.max_model_len,
        max_num_seqs=batch,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    return PearlEngine(config)


def rounds(args: argparse.Namespace, engine: PearlEngine, mode: str, batch: int) -> dict[str, Rounds]:
    """The engine's mode, with its own windows and those of ``--windows``, and AR, in one engine: a window of 0."""
    prompts = prompts_of(args, engine, batch)
    found = {}
    fixed = [int(window) for window in args.windows.split(",") if window]
    for name, window in ((mode, None), *((f"{mode} {window}", window) for window in fixed), ("ar", 0)):
        params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True, num_speculative_tokens=window)
        engine.generate(prompts, params)  # the prefix cache and the window's choice settle
        before = {r.round for r in ray.get(engine.coordinator.rounds.remote())[0]}
        engine.generate(prompts, params)
        target, draft = ray.get(engine.coordinator.rounds.remote())
        target = [r for r in target if r.round not in before]
        if args.every_round is not None:
            with args.every_round.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in _lines(name, batch, target, draft))
        result = steady(target, draft, batch)
        if result is not None:
            found[name] = result
    return found


def _lines(
    mode: str, batch: int, rounds: Sequence[RoundSummary], drafts: Sequence[DraftSummary]
) -> Iterator[dict[str, object]]:
    """Each round as it was: times in milliseconds, and per sequence how many tokens were drafted and accepted."""
    by_round = {draft.round: draft for draft in drafts}
    for r in rounds:
        seconds = {"finished": r.finished, "target": r.forward_s, "wait": r.wait_s, "gap": r.gap_s}
        steps = 0
        if (draft := by_round.get(r.round)) is not None:
            seconds |= {"draft": draft.forward_s, "advance": draft.advance_s, "draft_finished": draft.finished}
            steps = draft.num_steps
        line = {"mode": mode, "batch": batch, "round": r.round, "rows": r.num_target_rows, "steps": steps}
        windows = {
            "drafted": [len(s.drafted) for s in r.sequences],
            "accepted": [s.num_accepted for s in r.sequences],
        }
        yield line | {name: round(1e3 * value, 3) for name, value in seconds.items()} | windows


def print_rounds(batch: int, found: dict[str, Rounds], step_bytes: int, bandwidth: float) -> None:
    """A line per mode, and what the issue's bars are made of."""
    for name, r in found.items():
        print(
            f"{batch:>5} {name:>7} {r.count:>6} {r.rows:>5.0f} {r.period:>9.3f} {r.target:>9.3f} {r.draft:>9.3f} "
            f"{r.wait:>8.3f} {1e3 * r.gap:>8.1f} {r.slower:>8.3f} {r.tokens_per_s:>9.1f} {r.tokens_per_forward:>8.3f}"
        )
    if "ar" in found:
        share = step_bytes / bandwidth / (found["ar"].period / 1e3)
        print(f"      AR step: weight bytes / copy bandwidth over its time {share:.3f}")
    for name, r in found.items():
        if name != "ar" and "ar" in found:
            speedup = r.tokens_per_s / found["ar"].tokens_per_s
            print(
                f"      {name} / AR tokens/s {speedup:.3f} = {speedup / r.tokens_per_forward:.3f} x tokens per forward"
            )


def step_bytes(args: argparse.Namespace) -> int:
    """Bytes of the target's weights that a decoding step reads: all but an embedding that isn't the head too."""
    from pearl_ray.model.source import open_source

    source = open_source(args.target)
    names = [n for n in source.names() if n != "model.embed_tokens.weight" or source.config.tie_word_embeddings]
    return sum(source.stored_bytes(name) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--window", type=int, help="tokens the draft makes per round; default: chosen by the engine")
    parser.add_argument("--windows", default="", help="measure rounds with these windows too: 4,8")
    parser.add_argument("--only", default="correctness,rounds,pieces")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--target-tp", type=int, default=1)
    parser.add_argument("--draft-tp", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--colocate", action="store_true")
    parser.add_argument("--roles", default="target,draft", help="whose pieces")
    parser.add_argument("--profile", action="store_true", help="the kernels of each piece, by the time they take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--every-round", type=Path, help="append each measured round to this file, a JSON line each")
    args = parser.parse_args()
    only, batches = args.only.split(","), [int(b) for b in args.batches.split(",")]
    device = torch.device(args.device)
    bandwidth, read = copy_bandwidth(device), step_bytes(args)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; copy {bandwidth / 1e12:.3f} TB/s; a step reads {read / 1e9:.2f} GB")
    report: dict[str, object] = {"device": name, "torch": torch.__version__, "bandwidth": bandwidth, "bytes": read}
    for mode in ("pearl", "sd"):
        wanted = {"correctness", "rounds"} if mode == "pearl" else {"sd"}
        if not wanted & set(only):
            continue
        with engine_of(args, mode, max(batches)) as engine:
            graphs = {"graphs": engine.status()["graphs"]}
            print(f"{mode}: " + ("; ".join(": ".join(row) for row in figures_of(graphs)) or "no CUDA graphs"))
            report[f"{mode} graphs"] = graphs["graphs"]
            if mode == "pearl" and "correctness" in only:
                report["correctness"] = [compare(engine, prompts_of(args, engine, b), args.tokens) for b in batches]
            if mode == "sd" or "rounds" in only:
                print(HEAD)
                for batch in batches:
                    found = rounds(args, engine, mode, batch)
                    print_rounds(batch, found, read, bandwidth)
                    report[f"{mode} {batch}"] = {key: value._asdict() for key, value in found.items()}
    if "pieces" in only:
        report["pieces"] = pieces(args)
        print(f"      copy bandwidth {bandwidth / 1e12:.3f} TB/s")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
