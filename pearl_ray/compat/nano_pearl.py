"""nano-PEARL's Python face over ``PearlEngine``: its example.py and bench.py run with only the import changed.

Differences that can be seen: the output is exactly the target's at every temperature, texts leave out special tokens,
and ``AR_generate`` after ``generate`` starts an engine of its own (the time of that isn't counted).
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from pearl_ray.config import PearlConfig
from pearl_ray.core.errors import ConfigError
from pearl_ray.core.outputs import run_lengths
from pearl_ray.core.params import SamplingParams as _SamplingParams
from pearl_ray.core.phases import Origin

if TYPE_CHECKING:
    from pearl_ray.engine import PearlEngine
    from pearl_ray.model.tokenizer import Tokenizer

__all__ = ["PEARLConfig", "PEARLEngine", "SamplingParams", "logger"]

Result = tuple[list[str], list[int], list[list[int]] | None, float]


@dataclass
class SamplingParams:
    """nano-PEARL's three sampling settings, with its defaults. Bad values raise ``ConfigError``."""

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self.to_pearl()

    def to_pearl(self) -> _SamplingParams:
        """The same as our own parameters."""
        return _SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens, ignore_eos=self.ignore_eos)


@dataclass
class PEARLConfig:
    """nano-PEARL's settings by its names, but for those of its process groups.

    ``max_num_batched_tokens``, ``max_num_seqs`` and ``max_model_len`` default to what ours do; -1 means "auto" for
    ``gamma`` and ``num_kvcache_blocks``, as there. Bad values raise ``ConfigError``.
    """

    draft_model_path: str
    target_model_path: str
    draft_tensor_parallel_size: int = 2
    target_tensor_parallel_size: int = 2
    _: KW_ONLY
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    kvcache_block_size: int = 16
    num_kvcache_blocks: int = -1
    enforce_eager: bool = False
    gamma: int = -1

    def __post_init__(self) -> None:
        self.to_pearl()

    def to_pearl(self) -> PearlConfig:
        """The same as our own config."""
        return PearlConfig(
            draft_model=self.draft_model_path,
            target_model=self.target_model_path,
            draft_tensor_parallel_size=self.draft_tensor_parallel_size,
            target_tensor_parallel_size=self.target_tensor_parallel_size,
            num_speculative_tokens="auto" if self.gamma == -1 else self.gamma,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
            gpu_memory_utilization=self.gpu_memory_utilization,
            block_size=self.kvcache_block_size,
            kv_cache_blocks=None if self.num_kvcache_blocks == -1 else self.num_kvcache_blocks,
            enforce_eager=self.enforce_eager,
        )


class PEARLEngine:
    """Collects requests, answers them all at once, and tells how it went.

    The three ``generate``s return ``(texts, num_tokens, num_acc_tokens, elapsed_s)``, one entry per request, in the
    order of ``add_request``. ``num_acc_tokens`` holds, per request, the length of each run of accepted
    tokens, the target's own token that ended it included; its mean is what nano-PEARL calls MAT.
    """

    def __init__(self, config: PEARLConfig) -> None:
        self.config = config
        self._waiting: list[tuple[list[int], SamplingParams]] = []
        self._engine: PearlEngine | None = None
        self._start()
        atexit.register(self.exit)

    @property
    def tokenizer(self) -> Tokenizer:
        """The pair's tokenizer."""
        return self._start().tokenizer

    def _start(self) -> PearlEngine:
        """The engine, started again after :meth:`exit`."""
        from pearl_ray.engine import PearlEngine

        if self._engine is None:
            self._engine = PearlEngine(self.config.to_pearl())
        return self._engine

    def add_request(self, prompt: str | list[int], sampling_params: SamplingParams) -> None:
        """Queue a prompt; a text goes into the chat template as the user's message, token ids are taken as they are."""
        if isinstance(prompt, str):
            message = [{"role": "user", "content": prompt}]
            tokenizer = self.tokenizer
            ids = tokenizer.encode(tokenizer.apply_chat_template(message), add_special_tokens=False)
        else:
            ids = list(prompt)
        self._waiting.append((ids, sampling_params))

    def generate(self) -> Result:
        """Answer the queued requests with PEARL."""
        return self._run()

    def AR_generate(self) -> Result:
        """Answer the queued requests with the target alone; ``num_acc_tokens`` is None."""
        texts, num_tokens, _, elapsed_s = self._run(num_speculative_tokens=0)
        return texts, num_tokens, None, elapsed_s

    def bench_generate(self, num_pearl_steps: int = 100) -> Result:
        """Run each queued request for so many rounds behind its first token, past any end of sequence.

        A request ends earlier only where the model's length does; its ``max_tokens`` doesn't count, as in nano-PEARL.
        """
        if isinstance(num_pearl_steps, bool) or not isinstance(num_pearl_steps, int) or num_pearl_steps < 1:
            raise ConfigError("num_pearl_steps", num_pearl_steps, "a whole number from 1")
        engine = self._start()
        waiting, self._waiting = self._waiting, []

        def run(request: tuple[list[int], SamplingParams]) -> _Answer:
            prompt, params = request
            endless = dataclasses.replace(params.to_pearl(), ignore_eos=True, max_tokens=None)
            return _rounds(engine, prompt, endless, num_pearl_steps)

        started = time.perf_counter()
        with ThreadPoolExecutor(max_workers=max(len(waiting), 1)) as pool:
            answers = list(pool.map(run, waiting))
        return _result(answers, time.perf_counter() - started)

    def _run(self, num_speculative_tokens: int | None = None) -> Result:
        engine = self._start()
        waiting, self._waiting = self._waiting, []
        started = time.perf_counter()
        each = [
            dataclasses.replace(params.to_pearl(), num_speculative_tokens=num_speculative_tokens)
            for _, params in waiting
        ]
        outputs = engine.generate([ids for ids, _ in waiting], each)
        elapsed_s = time.perf_counter() - started
        firsts = [output.outputs[0] for output in outputs]
        return _result([_Answer(first.text, list(first.token_ids), list(first.origins)) for first in firsts], elapsed_s)

    def exit(self) -> None:
        """End the engine and its actors; runs by itself when Python ends."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


@dataclass
class _Answer:
    text: str
    token_ids: list[int]
    origins: list[Origin]


def _rounds(engine: PearlEngine, prompt: list[int], params: _SamplingParams, num_rounds: int) -> _Answer:
    """Stream one answer and abort it after so many chunks behind the first; a chunk is what a round committed."""
    answer = _Answer("", [], [])
    seen = -1
    for chunk in engine.stream(prompt, params):
        answer.text += chunk.text
        answer.token_ids += chunk.token_ids
        answer.origins += chunk.origins
        seen += bool(chunk.token_ids)
        if seen >= num_rounds:
            engine.abort(chunk.request_id)
            break
    return answer


def _result(answers: Sequence[_Answer], elapsed_s: float) -> Result:
    runs = []
    for answer in answers:
        *ended, last = run_lengths(answer.origins)
        runs.append([length + 1 for length in ended] + [last])
    return [a.text for a in answers], [len(a.token_ids) for a in answers], runs, elapsed_s


def _make_logger() -> logging.Logger:
    """A logger whose ``info`` takes ``color=``, as nano-PEARL's scripts call it; rich draws it."""
    from rich.logging import RichHandler
    from rich.markup import escape

    class ColorLogger(logging.Logger):
        def info(self, msg: object, *args: object, color: str | None = None, **settings: Any) -> None:  # noqa: ANN401
            text = f"[{color}]{escape(str(msg))}[/]" if color else escape(str(msg))
            super().info(text, *args, stacklevel=2, **settings)

    made = ColorLogger("PEARL", logging.INFO)
    handler = RichHandler(show_path=False, markup=True, omit_repeated_times=False, log_time_format="%H:%M:%S")
    handler.setFormatter(logging.Formatter("%(message)s"))
    made.addHandler(handler)
    return made


logger = _make_logger()
