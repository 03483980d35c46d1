"""The coordinator actor: owns the requests, hears of every round, decides what changes. A Ray shell of `Controller`.

One asyncio loop does everything, so the controller needs no lock: client calls and round summaries are taken in turn.
A round never waits for this process; it learns of rounds a moment later.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence

import ray
from ray.util.placement_group import PlacementGroup

from pearl_ray.actors import report
from pearl_ray.actors.bringup import BringUp, Deployment, place
from pearl_ray.actors.clients import Batch, Clients
from pearl_ray.actors.intake import Intake, Prompt
from pearl_ray.actors.logs import log_to_stderr
from pearl_ray.actors.spec import DeploymentSpec
from pearl_ray.actors.trace import chrome_trace
from pearl_ray.cluster.channels import Inbox, Outbox
from pearl_ray.cluster.placement import Bundle, remove_placement_group
from pearl_ray.cluster.supervisor import Supervisor
from pearl_ray.core.blocks import BlockPool
from pearl_ray.core.controller import Controller, ControllerConfig
from pearl_ray.core.costs import FREE_ROWS
from pearl_ray.core.errors import EngineDeadError, PearlError
from pearl_ray.core.messages import DraftSummary, RoundSummary, Stop
from pearl_ray.core.outputs import RequestOutput
from pearl_ray.core.pacing import PacingPolicy
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.residents import SPARE_ROUNDS, SPARE_ROUNDS_AHEAD
from pearl_ray.core.schedule import Limits
from pearl_ray.core.windows import WindowPolicy
from pearl_ray.model.loading import open_models

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0
GRACE_S = 2.0  # after a failure: time for clients to hear of it before the process ends
MAX_CONCURRENCY = 10_000


class CoordinatorActor:
    """See the module. All methods are called through Ray; prompts are text, token ids, or a list of chat messages."""

    def __init__(self, spec: DeploymentSpec, bundles: Sequence[Bundle], group: PlacementGroup) -> None:
        log_to_stderr()
        self._spec = spec
        self._bundles = list(bundles)
        self._placement = group
        self._state = "starting"
        self._bring_up: BringUp | None = None
        self._deployment: Deployment | None = None
        self._controller: Controller | None = None
        self._intake: Intake | None = None
        self._inbox: Inbox | None = None
        self._folder: str | None = None
        self._outboxes: list[Outbox] = []
        self._leader_outbox: Outbox | None = None
        self._clients = Clients()
        self._failure: PearlError | None = None
        self._recoveries = dict.fromkeys(spec.roles, 0)  # shards replaced after a death
        self._tasks: set[asyncio.Task[None]] = set()
        self._runs: dict[str, ray.ObjectRef] = {}
        self._started_at = time.time()
        self._stopping = asyncio.Event()

    # -- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring the shards up. Raises what made it impossible; the deployment is then to be removed."""
        try:
            await self._start()
        except BaseException:
            if self._bring_up is not None:
                self._bring_up.discard()
            self._close()
            raise

    async def _start(self) -> None:
        spec = self._spec
        models = await asyncio.to_thread(
            open_models, spec.target_model, spec.draft_model, spec.cache_dir, with_draft="draft" in spec.roles
        )
        self._intake = Intake(models.tokenizer, models.num_valid["target"])
        shards = place(spec, self._placement, self._bundles)
        self._bring_up = BringUp(spec, shards)
        self._folder = tempfile.mkdtemp(prefix="pearl-")

        def open_inbox(folder: str | None, ip: str) -> str:
            self._inbox = Inbox(folder=folder) if folder is not None else Inbox(ip)
            return self._inbox.endpoint

        deployment = await self._bring_up.run(models, self._folder, open_inbox)
        self._deployment = deployment
        for key, endpoint in deployment.endpoints.items():
            outbox = Outbox(endpoint)
            self._outboxes.append(outbox)
            if key == ("target", 0):
                self._leader_outbox = outbox
        self._controller = self._make_controller(deployment, models.eos_token_ids, models.num_valid["target"])
        self._runs = {f"{role} {rank}": shard.run.remote() for (role, rank), shard in shards.items()}
        self._spawn(self._listen())
        self._spawn(self._watch())
        self._spawn(self._sweep())
        self._state = "ready"

    def _make_controller(self, deployment: Deployment, eos: frozenset[int], vocab_size: int) -> Controller:
        spec = self._spec
        config = ControllerConfig(
            limits=Limits(spec.mode, spec.max_num_batched_tokens),
            block_size=spec.block_size,
            max_num_seqs=spec.max_num_seqs,
            max_model_len=deployment.max_model_len,
            max_waiting_requests=spec.max_waiting_requests,
            verification=spec.verification,
            eos_token_ids=eos,
            vocab_size=vocab_size,
            seed=spec.seed,
            spare_rounds=SPARE_ROUNDS_AHEAD if spec.device == "cuda" else SPARE_ROUNDS,
        )
        caching = spec.enable_prefix_caching
        pools = [BlockPool(deployment.num_blocks, spec.block_size, prefix_caching=caching) for _ in range(2)]
        assert self._intake is not None
        return Controller(
            config,
            pools[0],
            pools[1] if "draft" in spec.roles else None,
            WindowPolicy(
                spec.mode,
                spec.num_speculative_tokens,
                deployment.costs,
                shares_device=spec.colocate,
                ahead_rows=FREE_ROWS if spec.device == "cuda" and spec.mode == "pearl" else None,
            ),
            decode=self._intake.tokenizer.decode,
            clock=time.monotonic,
            pacing=PacingPolicy(spec.min_decode_share, spec.max_num_batched_tokens) if spec.min_decode_share else None,
        )

    def _spawn(self, coroutine: object) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("coordinator task failed", exc_info=error)
            self._fail(error if isinstance(error, PearlError) else EngineDeadError(f"coordinator: {error!r}"))

    async def _listen(self) -> None:
        """Take summaries as they come, for as long as the deployment runs."""
        assert self._inbox is not None and self._controller is not None
        while not self._stopping.is_set():
            for message in await self._inbox.next():
                match message:
                    case RoundSummary():
                        self._controller.on_round(message)
                    case DraftSummary():
                        self._controller.on_draft(message)
                    case _:
                        raise AssertionError(f"unexpected message {type(message).__name__}")
                self._flush()

    def _flush(self) -> None:
        """Send what the controller decided to the shards, and new tokens to the clients."""
        assert self._controller is not None
        diff = self._controller.take_diff()
        if diff is not None:
            for outbox in self._outboxes:
                outbox.send(diff)
        self._clients.deliver(self._controller.take_updates())

    async def _watch(self) -> None:
        """Notice the first shard that dies, and end everything that depends on it."""
        death = await Supervisor(self._runs).wait_first_death()
        if not self._stopping.is_set():
            self._fail(EngineDeadError(f"shard {death.name} died ({_reason(death.error)}); running requests are lost"))

    async def _sweep(self) -> None:
        """Abort the requests of clients that stopped asking."""
        while not self._stopping.is_set():
            await asyncio.sleep(5.0)
            for request_id in self._clients.drop_silent(time.monotonic()):
                self._abort(request_id)

    def _fail(self, error: PearlError) -> None:
        """Tell every waiting client, then end the deployment."""
        if self._failure is not None:
            return
        logger.error("deployment %s fails: %s", self._spec.name, error)
        self._failure = error
        self._state = "failed"
        self._stopping.set()
        self._clients.fail(error)
        for shard in self._deployment.shards.values() if self._deployment else ():
            ray.kill(shard)
        self._spawn(self._end())

    async def _end(self) -> None:
        await asyncio.sleep(GRACE_S)
        self._close()
        remove_placement_group(self._placement)  # this actor sits in it: its process ends here

    async def shutdown(self) -> None:
        """End the shards in order: they finish their round and return. Running requests are aborted."""
        self._stopping.set()
        self._state = "stopping"
        self._clients.fail(EngineDeadError(f"deployment {self._spec.name!r} was stopped"))
        if self._leader_outbox is not None and self._runs:
            self._leader_outbox.send(Stop())
            runs = [asyncio.wrap_future(ref.future()) for ref in self._runs.values()]
            await asyncio.wait(runs, timeout=STOP_TIMEOUT_S)
        if self._deployment is not None:
            closing = [asyncio.wrap_future(s.close.remote().future()) for s in self._deployment.shards.values()]
            await asyncio.wait(closing, timeout=STOP_TIMEOUT_S)
        self._close()

    def _close(self) -> None:
        for task in list(self._tasks):
            if task is not asyncio.current_task():
                task.cancel()
        for outbox in self._outboxes:
            outbox.close()
        if self._inbox is not None:
            self._inbox.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- what clients call ------------------------------------------------------------------------------------------

    async def submit(
        self,
        client_id: str,
        prompts: Sequence[Prompt | Sequence[Mapping[str, object]]],
        params: Sequence[SamplingParams],
        request_ids: Sequence[str] | None = None,
    ) -> list[str]:
        """Queue requests for a client, all or none; returns their ids. Their tokens come through :meth:`next_batch`.

        Raises:
            RequestRefusedError, QueueFullError, ConfigError: nothing was queued.
            EngineDeadError: the deployment has failed or is stopping.
        """
        controller = self._ready()
        assert self._intake is not None
        await self._intake.check(params)
        encoded = [await self._intake.encode(prompt) for prompt in prompts]
        ids = list(request_ids) if request_ids is not None else [f"req-{uuid.uuid4().hex[:16]}" for _ in prompts]
        self._ready()
        queued: list[str] = []
        try:
            for request_id, (text, token_ids), param in zip(ids, encoded, params, strict=True):
                request = controller.submit(request_id, text, token_ids, param)
                queued.append(request_id)
                self._clients.add(client_id, request)
        except PearlError:
            for request_id in queued:
                self._abort(request_id)
                self._clients.forget(request_id)
            raise
        finally:
            self._flush()
        return ids

    async def next_batch(self, client_id: str, timeout_s: float = 10.0) -> Batch:
        """What came for a client since its last call, waiting up to ``timeout_s`` for something to come."""
        return await self._clients.next_batch(client_id, timeout_s)

    async def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> RequestOutput | list[RequestOutput]:
        """Answer a prompt (or several) and return when it is done: the whole API in one Ray call."""
        many = not isinstance(prompts, str) and not (len(prompts) > 0 and isinstance(prompts[0], int))
        wanted = list(prompts) if many else [prompts]
        if params is None:
            params = SamplingParams()
        each = [params] * len(wanted) if isinstance(params, SamplingParams) else list(params)
        client_id = f"call-{uuid.uuid4().hex}"
        outputs = await self._collect(client_id, await self.submit(client_id, wanted, each))
        return outputs if many else outputs[0]

    async def chat(
        self, messages: Sequence[Mapping[str, object]], params: SamplingParams | None = None
    ) -> RequestOutput:
        """Answer a conversation, through the model's chat template."""
        client_id = f"call-{uuid.uuid4().hex}"
        ids = await self.submit(client_id, [messages], [params or SamplingParams()])
        return (await self._collect(client_id, ids))[0]

    async def _collect(self, client_id: str, ids: Sequence[str]) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        try:
            while len(outputs) < len(ids):
                batch = await self._clients.next_batch(client_id, 60.0)
                outputs.update((output.request_id, output) for output in batch.finished)
        finally:
            for request_id in ids:
                if request_id not in outputs:
                    self._abort(request_id)
            self._clients.drop(client_id)
            self._flush_if_up()
        return [outputs[request_id] for request_id in ids]

    async def abort(self, request_id: str) -> bool:
        """End a request; False if it isn't running. Its last output says "abort"."""
        found = self._abort(request_id)
        self._flush_if_up()
        return found

    def _abort(self, request_id: str) -> bool:
        return self._controller is not None and self._failure is None and self._controller.abort(request_id)

    def _flush_if_up(self) -> None:
        if self._controller is not None and not self._stopping.is_set():
            self._flush()

    async def drop_client(self, client_id: str) -> None:
        """A client goes: its running requests are aborted."""
        for request_id in self._clients.drop(client_id):
            self._abort(request_id)
        self._flush_if_up()

    def _ready(self) -> Controller:
        if self._failure is not None:
            raise self._failure
        if self._controller is None or self._stopping.is_set():
            raise EngineDeadError(f"deployment {self._spec.name!r} is {self._state}")
        return self._controller

    # -- what it says of itself -------------------------------------------------------------------------------------

    async def progress(self) -> dict[str, object]:
        """How far the start-up is: phase, layers loaded, layers in all."""
        done, total = 0, 0
        if self._bring_up is not None and self._bring_up.phase == "loading":
            done, total = await self._bring_up.progress()
        return {"phase": self._bring_up.phase if self._bring_up else "placing", "done": done, "total": total}

    async def status(self) -> dict[str, object]:
        """State, models, shards with their processes, and what runs."""
        found = report.status(self._spec, self._deployment, self._controller)
        error = str(self._failure) if self._failure else None
        uptime_s = time.time() - self._started_at
        return found | {"state": self._state, "error": error, "uptime_s": uptime_s, "coordinator_pid": os.getpid()}

    async def model_paths(self) -> tuple[str | None, str | None]:
        """Target and draft as the deployment was given them; None: the embedded pair."""
        return self._spec.target_model, self._spec.draft_model

    async def stats(self) -> dict[str, object]:
        """The counters and gauges of /metrics, without the prefix."""
        return report.stats(self._spec, self._deployment, self._ready(), self._recoveries)

    async def rounds(self) -> tuple[list[RoundSummary], list[DraftSummary]]:
        """The newest rounds as both sides reported them, for benchmarks and traces."""
        statistics = self._ready().statistics
        return list(statistics.rounds), list(statistics.draft_rounds)

    async def chrome_trace(self) -> dict[str, object]:
        """The newest rounds as a Chrome trace (chrome://tracing, Perfetto)."""
        statistics = self._ready().statistics
        return chrome_trace(statistics.rounds, statistics.draft_rounds)

    async def ping(self) -> str:
        """The state: starting, ready, stopping or failed."""
        return self._state


def _reason(error: BaseException | None) -> str:
    """One line of a shard's end: its own error, or Ray's word that the process is gone."""
    if error is None:
        return "its loop ended"
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    return "its process ended" if isinstance(error, ray.exceptions.RayActorError) else str(error)


Coordinator = ray.remote(max_concurrency=MAX_CONCURRENCY, max_restarts=0)(CoordinatorActor)
