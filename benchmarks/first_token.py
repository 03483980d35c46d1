"""A short request that comes while a long prompt prefills: python -m benchmarks.first_token [--prompt-tokens 30000 …]

With --tiny on the tests' tiny pair (a CPU takes the 30,000 tokens in seconds); else on models that take so many: a
pair of `scaled_checkpoint --context 32768`, say; the embedded pair takes --prompt-tokens 8000. One engine, `pearl`,
with --chunk tokens a forward pass (max_num_batched_tokens). Measured in one run:

  chunk    seconds of one chunk of the long prompt: its time to first token by its chunks, the short request beside it
  first    time to first token of a 20-token request submitted when a third of the prefill is done; bar: 3 chunks
  decode   tokens/s of 8 other running requests while a long prompt prefills, by those without; bar: 0.7 on GPUs
  prefill  seconds to the long prompt's first token, alone and beside the 8, and the rounds of the latter

Each figure is the median of --repeats runs with new prompts (nothing is found in the prefix cache). Prints; asserts
nothing on time.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pearl_ray import PearlConfig, PearlEngine, SamplingParams

NUM_DECODING = 8
SHORT_TOKENS = 20
SHORT_OUTPUT = 4


def say(text: str) -> None:
    print(text, flush=True)


@dataclass(slots=True)
class Stream:
    """One request in a thread of its own; when each of its tokens came."""

    engine: PearlEngine
    prompt: list[int]
    max_tokens: int
    started: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    error: BaseException | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> Stream:
        self.started = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=self.max_tokens, ignore_eos=True)
        try:
            for chunk in self.engine.stream(self.prompt, params):
                self.arrivals.append((time.monotonic(), len(chunk.token_ids)))
                if self._stopped.is_set():
                    return
        except BaseException as error:
            self.error = error

    def wait_for_tokens(self, count: int = 1) -> None:
        """Until so many have come."""
        while sum(n for _, n in self.arrivals) < count:
            if self.error is not None:
                raise self.error
            if self._thread is not None and not self._thread.is_alive():
                raise RuntimeError("a stream ended early")
            time.sleep(0.0005)

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0][0] - self.started

    def tokens_between(self, begin: float, end: float) -> int:
        return sum(n for at, n in list(self.arrivals) if begin < at <= end)

    def finish(self, stop: bool = False) -> None:
        if stop:
            self._stopped.set()
        assert self._thread is not None
        self._thread.join()
        if self.error is not None:
            raise self.error


@dataclass(frozen=True, slots=True)
class Prompts:
    """Random tokens, never the same twice."""

    vocab_size: int
    chance: random.Random

    def of(self, count: int) -> list[int]:
        return [self.chance.randrange(2, self.vocab_size) for _ in range(count)]


def first_token(engine: PearlEngine, prompts: Prompts, num_prompt: int, chunk: int) -> tuple[float, float, float]:
    """Seconds: of one chunk, to the short request's first token, to the long one's when it is alone."""
    alone = Stream(engine, prompts.of(num_prompt), 1).start()
    alone.finish()
    long = Stream(engine, prompts.of(num_prompt), 1).start()
    time.sleep(alone.first_s / 3)
    short = Stream(engine, prompts.of(SHORT_TOKENS), SHORT_OUTPUT).start()
    short.wait_for_tokens()
    came_first = not long.arrivals
    short.finish()
    long.finish()
    chunks = -(-num_prompt // chunk)
    if not came_first:
        say("    the long prompt's first token came before the short request's: the prompt is too short to measure by")
    return long.first_s / chunks, short.first_s, alone.first_s


def decoding(
    engine: PearlEngine, prompts: Prompts, num_prompt: int, max_tokens: int
) -> tuple[float, float, float, int]:
    """Tokens/s of the running requests (without, during) a long prompt's prefill; its seconds, and its rounds."""
    running = [Stream(engine, prompts.of(SHORT_TOKENS), max_tokens).start() for _ in range(NUM_DECODING)]
    for stream in running:
        stream.wait_for_tokens(8)
    begin = time.monotonic()
    target = [sum(n for _, n in s.arrivals) + 48 for s in running]
    for stream, count in zip(running, target, strict=True):
        stream.wait_for_tokens(count)
    end = time.monotonic()
    without = sum(s.tokens_between(begin, end) for s in running) / (end - begin)
    long = Stream(engine, prompts.of(num_prompt), 1).start()
    long.wait_for_tokens()
    begin, end = long.started, long.started + long.first_s
    ended = [s.arrivals[-1][0] for s in running if sum(n for _, n in s.arrivals) == max_tokens]
    if ended and min(ended) < end:
        end = min(ended)
        part = (end - begin) / long.first_s
        say(f"    a running request ended after {part:.2f} of the prefill: measured up to there")
    during = sum(s.tokens_between(begin, end) for s in running) / (end - begin)
    rounds = max(sum(begin < at <= end for at, _ in list(s.arrivals)) for s in running)  # each brought some tokens
    for stream in running:
        stream.finish(stop=True)
    long.finish()
    return without, during, long.first_s, rounds


@contextmanager
def models_of(args: argparse.Namespace) -> Iterator[tuple[str | None, str | None]]:
    """Paths of target and draft; those of the tiny pair are written for the run."""
    if not args.tiny:
        yield args.target_model, args.draft_model
        return
    from tests.tiny import tiny_pair

    with tempfile.TemporaryDirectory(prefix="pearl-first-token-") as folder:
        target, draft = tiny_pair(Path(folder))
        yield str(target), str(draft)


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-model", help="a directory, a .gguf file or a Hub name")
    parser.add_argument("--draft-model", help="the same")
    parser.add_argument("--tiny", action="store_true", help="the tests' tiny pair (32k context)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--colocate", action="store_true", help="draft and target on the same GPU")
    parser.add_argument("--target-tp", type=int, default=1)
    parser.add_argument("--draft-tp", type=int, default=1)
    parser.add_argument("--mode", default="pearl", choices=("pearl", "sd", "ar"))
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=2048, help="max_num_batched_tokens")
    share = PearlConfig().min_decode_share
    parser.add_argument("--min-decode-share", type=float, default=share, help="0: the prompt goes as fast as it can")
    parser.add_argument("--prompt-tokens", type=int, default=30_000, help="length of the long prompt")
    parser.add_argument("--vocab", type=int, default=64, help="prompts are made of ids from 2 to below this")
    parser.add_argument("--decode-tokens", type=int, default=4096, help="most that a running request writes")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    say(f"commit {commit}, torch {torch.__version__}, {platform.machine()}, device {args.device}, chunk {args.chunk}")
    say(f"min_decode_share {args.min_decode_share}, prompt of {args.prompt_tokens} tokens")
    prompts = Prompts(args.vocab, random.Random(1))
    room = args.prompt_tokens + NUM_DECODING * (args.decode_tokens + SHORT_TOKENS) + 8192
    with models_of(args) as (target, draft):
        config = PearlConfig(
            target_model=target,
            draft_model=draft,
            mode=args.mode,
            target_tensor_parallel_size=args.target_tp,
            draft_tensor_parallel_size=args.draft_tp,
            num_speculative_tokens=args.num_speculative_tokens,
            max_model_len=args.prompt_tokens + 64,
            max_num_seqs=32,
            max_num_batched_tokens=args.chunk,
            min_decode_share=args.min_decode_share,
            kv_cache_blocks=-(-room // 16) if args.device == "cpu" or args.tiny else None,
            device=args.device,
            colocate=args.colocate,
        )
        with PearlEngine(config) as engine:
            Stream(engine, prompts.of(2 * args.chunk), 16).start().finish()  # warm
            firsts = [first_token(engine, prompts, args.prompt_tokens, args.chunk) for _ in range(args.repeats)]
            rates = [decoding(engine, prompts, args.prompt_tokens, args.decode_tokens) for _ in range(args.repeats)]
    for chunk_s, first_s, _ in firsts:
        say(f"    chunk {chunk_s * 1e3:.1f} ms, first token of the short request {first_s * 1e3:.1f} ms")
    for without, during, *_ in rates:
        say(f"    {NUM_DECODING} running requests: {without:.1f} tokens/s, during the prefill {during:.1f}")
    chunks = statistics.median(first_s / chunk_s for chunk_s, first_s, _ in firsts)
    share = statistics.median(during / without for without, during, *_ in rates)
    alone = statistics.median(alone_s for *_, alone_s in firsts)
    beside = statistics.median(long_s for _, _, long_s, _ in rates)
    rounds = statistics.median(count for *_, count in rates)
    say(f"  first token of a {SHORT_TOKENS}-token request: {chunks:.2f} chunk times (bar: below 3)")
    say(f"  decoding during a {args.prompt_tokens}-token prefill: {share:.2f} of that without (bar: 0.7 on GPUs)")
    longer = beside / alone
    say(f"  its prefill: {alone:.2f} s alone, {beside:.2f} s beside them ({longer:.1f} times), in {rounds:.0f} rounds")


if __name__ == "__main__":
    main()
