"""A coordinator without models for the server's tests: one character per token, an answer that is known beforehand.

And servers over it, and clients that wait for what must come, however slow the machine is.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from pearl_ray.actors.clients import Batch
from pearl_ray.core.errors import PearlError, QueueFullError
from pearl_ray.core.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Origin
from pearl_ray.core.requests import Update
from pearl_ray.serving.backend import Model
from pearl_ray.serving.server import HttpServer, bind
from pearl_ray.serving.settings import ServerSettings
from tests.together import holds_within

ANSWER = "The quick brown fox jumps over the lazy dog. "
VOCAB_SIZE = 0x3000
MAX_MODEL_LEN = 2000
WAIT_S = 60.0  # for what must come, however loaded the machine is
HOLD_POLL_S = 0.005
# The origins of a first round, and of those after it in turn.
FIRST: tuple[Origin, ...] = ("prefill",)
ROUNDS: tuple[tuple[Origin, ...], ...] = (
    ("pre_verify", "post_verify", "residual"),
    ("pre_verify", "post_verify"),
    ("residual",),
)


class FakeTokenizer:
    """Ids are code points; 0 is the end of sequence.

    Args:
        knows_tools: what the template says of tools, with the tools' names behind it; "": it ignores them.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, knows_tools: str = "") -> None:
        self.knows_tools = knows_tools

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([1] if add_special_tokens else []) + [ord(c) for c in text if ord(c) < VOCAB_SIZE]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(t) for t in token_ids if t > 1 or not skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_args: Any,
    ) -> str:
        text = "".join(f"{m['role']}: {m['content']}{m.get('tool_calls', '')}\n" for m in messages)
        if tools and self.knows_tools:
            text = f"{self.knows_tools} {' '.join(tool['function']['name'] for tool in tools)}\n{text}"
        return text + template_args.get("suffix", "") + ("assistant:" if add_generation_prompt else "")


class FakeEngine:
    """Answers every request with its text, over and over, in rounds of 1, 3, 2, 1, 3, 2, 1, … tokens.

    Attributes:
        delay_s: between rounds.
        room: requests that may run; more raise ``QueueFullError``.
        once: the text ends the answer, instead of beginning again.
        held: while it is true no answer goes on after its first round, however long that takes; set it from any thread.
        running, aborted: request ids.
        refused: calls that found no room.
        submitted: the parameters of all requests.
        state: what status() says.
    """

    def __init__(
        self, delay_s: float = 0.0, room: int = 1000, text: str = ANSWER, once: bool = False, held: bool = False
    ) -> None:
        self.delay_s, self.room, self.text, self.once, self.held = delay_s, room, text, once, held
        self.running: dict[str, asyncio.Task[None]] = {}
        self.aborted: list[str] = []
        self.refused = 0
        self.submitted: list[tuple[list[int], SamplingParams]] = []
        self.clients: set[str] = set()
        self.state: dict[str, Any] = {"state": "ready", "error": None}
        self.failure: PearlError | None = None
        self._batch, self._arrived = Batch(), asyncio.Event()

    async def submit(
        self, client_id: str, prompts: Sequence[list[int]], params: Sequence[SamplingParams], request_ids: Sequence[str]
    ) -> None:
        if len(self.running) + len(prompts) > self.room:
            self.refused += 1
            raise QueueFullError("1 sequences wait and max_waiting_requests is 1; retry later")
        self.clients.add(client_id)
        for request_id, prompt, param in zip(request_ids, prompts, params, strict=True):
            self.submitted.append((prompt, param))
            self.running[request_id] = asyncio.create_task(self._generate(request_id, prompt, param))

    async def _generate(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        limit = min(params.max_tokens or MAX_MODEL_LEN, MAX_MODEL_LEN - len(prompt))
        text = (self.text * (1 if self.once else limit // len(self.text) + 1))[:limit]
        for stop in params.stop:
            text = text.split(stop)[0]
        reason = "length" if len(text) == limit else "stop"
        rounds, at = itertools.chain([FIRST], itertools.cycle(ROUNDS)), 0
        while at < len(text):
            origins = next(rounds)
            part = text[at : at + len(origins)]
            at += len(part)
            for index in range(params.n):
                self._put(request_id, index, part, origins[: len(part)], params, reason if at == len(text) else None)
            await asyncio.sleep(self.delay_s)
            while self.held:
                await asyncio.sleep(HOLD_POLL_S)
        outputs = [_answer(index, text, params, reason) for index in range(params.n)]
        self._finish(request_id, prompt, params, outputs)

    def _put(
        self,
        request_id: str,
        index: int,
        text: str,
        origins: tuple[Origin, ...],
        params: SamplingParams,
        reason: Any,
    ) -> None:
        ids = tuple(map(ord, text))
        logprobs = _logprobs(text, params)
        stop = params.stop[0] if reason == "stop" and params.stop else None
        self._batch.updates.append(Update(request_id, index, ids, origins, text, reason, stop, logprobs))
        self._arrived.set()

    def _finish(
        self, request_id: str, prompt: list[int], params: SamplingParams, outputs: list[CompletionOutput]
    ) -> None:
        self.running.pop(request_id, None)
        metrics = RequestMetrics(num_target_forwards=4, tokens_per_target_forward=2.5, rounds={"pre_verify": 4})
        self._batch.finished.append(
            RequestOutput(
                request_id=request_id,
                prompt=None,
                prompt_token_ids=prompt,
                outputs=outputs,
                finished=True,
                metrics=metrics,
                seed=7,
                prompt_logprobs=_prompt_logprobs(prompt, params),
            )
        )
        self._arrived.set()

    async def next_batch(self, client_id: str, timeout_s: float) -> Batch:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), min(timeout_s, 0.5))
        if self.failure is not None:
            raise self.failure
        self._arrived.clear()
        batch, self._batch = self._batch, Batch()
        return batch

    async def abort(self, request_id: str) -> None:
        task = self.running.get(request_id)
        if task is not None:
            task.cancel()
            self.aborted.append(request_id)  # first: a test looks from another thread, at any moment
            del self.running[request_id]

    def fail(self, error: PearlError) -> None:
        """The coordinator dies."""
        self.failure = error

    async def stats(self) -> Mapping[str, Any]:
        return {
            "num_requests_running": len(self.running),
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": {"target": 0.25, "draft": 0.5},
            "prompt_tokens_total": sum(len(prompt) for prompt, _ in self.submitted),
            "generation_tokens_total": 10,
            "request_success_total": {"stop": 2, "length": 1},
            "spec_decode_num_accepted_tokens_per_pos_total": {0: 5, 1: 3},
            "phase_sequences": {"pre_verify": 1, "post_verify": 0},
            "round_seconds": {"target": {"sum": 1.5, "count": 30}},
            "recoveries_total": {"draft": 0},
            "unknown_to_the_server": 3,
        }

    async def status(self) -> Mapping[str, Any]:
        return self.state


def _answer(index: int, text: str, params: SamplingParams, reason: Any) -> CompletionOutput:
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=list(map(ord, text)),
        logprobs=_logprobs(text, params),
        finish_reason=reason,
        stop_reason=params.stop[0] if reason == "stop" and params.stop else None,
        origins=[*FIRST, *itertools.islice(itertools.cycle(itertools.chain(*ROUNDS)), len(text) - 1)],
    )


def _logprobs(text: str, params: SamplingParams) -> list[dict[int, Logprob]] | None:
    """The chosen character is the likeliest; the digits follow it."""
    if params.logprobs is None:
        return None
    others = {ord("0") + i: Logprob(-2.0 - i, i + 2, str(i)) for i in range(params.logprobs - 1)}
    return [{ord(c): Logprob(-0.5, 1, c), **others} for c in text]


def _prompt_logprobs(prompt: list[int], params: SamplingParams) -> list[dict[int, Logprob] | None] | None:
    """Each token is the second likeliest; the likeliest is a tilde."""
    if params.prompt_logprobs is None:
        return None
    tops = {ord("~"): Logprob(-0.25, 1, "~")} if params.prompt_logprobs else {}
    return [None, *({token: Logprob(-1.0 - i, 2, chr(token)), **tops} for i, token in enumerate(prompt[1:]))]


def wait_until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    """Poll, from another thread than the server's."""
    assert holds_within(condition, timeout_s), "it never came true"


@contextmanager
def serving(
    engine: FakeEngine | None = None, tokenizer: FakeTokenizer | None = None, **settings: Any
) -> Iterator[HttpServer]:
    """A server on a free port over a fake engine; ``engine`` None: one that is still loading."""
    with HttpServer(ServerSettings(**{"version": "1.2.3", **settings}), bind("127.0.0.1", 0)) as server:
        if engine is not None:
            server.attach(engine, Model(tokenizer or FakeTokenizer(), MAX_MODEL_LEN))
        yield server


def client_of(server: HttpServer) -> httpx.Client:
    """A client for its paths, with patience."""
    return httpx.Client(base_url=server.url, timeout=WAIT_S)


@contextmanager
def asking(
    engine: FakeEngine | None = None, tokenizer: FakeTokenizer | None = None, **settings: Any
) -> Iterator[httpx.Client]:
    """:func:`serving`, of which only a client is needed."""
    with serving(engine, tokenizer, **settings) as server, client_of(server) as client:
        yield client


def scraped(url: str) -> str:
    """The figures with the coordinator's among them, which a scrape goes without if they don't come within seconds."""
    texts = [""]

    def is_whole() -> bool:
        texts.append(httpx.get(f"{url}/metrics", timeout=WAIT_S).text)
        return "pearl:num_requests_running" in texts[-1]

    wait_until(is_whole)
    return texts[-1]


def is_refused(url: str) -> bool:
    """Whether nobody listens there."""
    try:
        httpx.get(f"{url}/health", timeout=WAIT_S)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # it is ending
        pass
    return False
