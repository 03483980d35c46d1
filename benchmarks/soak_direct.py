"""A deployment as the soak's load sees it through the coordinator's handle: what ``Client.stream`` does, in asyncio."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

from benchmarks.soak_cases import Case
from benchmarks.soak_load import Piece
from pearl_ray.core.errors import PearlError
from pearl_ray.core.outputs import RequestOutput
from pearl_ray.core.params import SamplingParams, StructuredOutputsParams

POLL_S = 10.0


class DirectService:
    """One client of the coordinator per stream."""

    errors: tuple[type[Exception], ...] = (ray.exceptions.RayError, PearlError)

    def __init__(self, coordinator: ActorHandle[Any]) -> None:
        self._coordinator = coordinator

    async def stream(self, case: Case) -> AsyncGenerator[Piece]:
        """See ``Service``."""
        client_id = f"soak-{uuid.uuid4().hex}"
        texts: Counter[int] = Counter()
        try:
            await self._coordinator.submit.remote(client_id, [case.prompt], [params_of(case.fields)])
            while True:
                batch = await self._coordinator.next_batch.remote(client_id, POLL_S)
                for u in batch.updates:
                    texts[u.index] += len(u.text)
                    yield Piece(u.index, u.text, len(u.token_ids), u.finish_reason)
                if batch.finished:
                    _check(case, batch.finished[0], texts)
                    return
        finally:
            self._coordinator.drop_client.remote(client_id)

    async def gauges(self) -> dict[str, float]:
        """See ``Service``."""
        stats = await self._coordinator.stats.remote()
        found = {"running": stats["num_requests_running"], "waiting": stats["num_requests_waiting"]}
        return found | {f"cache {name}": usage for name, usage in stats["kv_cache_usage_perc"].items()}


def params_of(fields: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters of a request's fields."""
    structured = fields.get("structured_outputs")
    wish = None if structured is None else StructuredOutputsParams(**structured)
    return SamplingParams(**{**fields, "structured_outputs": wish})


def _check(case: Case, output: RequestOutput, num_chars: Mapping[int, int]) -> None:
    """Raise ValueError where the whole output isn't what was streamed, or lacks log-probabilities."""
    for answer in output.outputs:
        if len(answer.text) != num_chars[answer.index]:
            raise ValueError(f"{num_chars[answer.index]} characters were streamed of {answer.text!r}")
        scored = None if answer.logprobs is None else len(answer.logprobs)
        if scored != (len(answer.token_ids) if "logprobs" in case.fields else None):
            raise ValueError(f"log-probabilities of {scored} tokens of {len(answer.token_ids)}")
