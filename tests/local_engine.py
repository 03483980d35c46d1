"""A whole deployment in the threads of one process: real loops, groups, mailboxes, channels and models, without Ray.

Starts in a fraction of a second, so that tests can go through many arrangements; what Ray adds is tested in tests/ray.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

import torch

from pearl_ray.actors.device import DeviceParts, capture, make_parts
from pearl_ray.actors.device_target import DeviceTargetLoop
from pearl_ray.actors.draft_loop import DraftLoop
from pearl_ray.actors.epochs import FollowerEpochs, LeaderEpochs
from pearl_ray.actors.grammars import Grammars
from pearl_ray.actors.target_loop import TargetLoop
from pearl_ray.cluster.bridge import Bridge
from pearl_ray.cluster.channels import Inbox, Outbox
from pearl_ray.cluster.mailbox import ShmMailbox
from pearl_ray.cluster.meeting import join_group
from pearl_ray.cluster.shm import arena_path
from pearl_ray.core.blocks import BlockPool
from pearl_ray.core.comm import Group
from pearl_ray.core.controller import Controller, ControllerConfig
from pearl_ray.core.messages import DraftSummary, Message, RoundSummary, Stop
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Mode
from pearl_ray.core.replica import Replica
from pearl_ray.core.requests import Request
from pearl_ray.core.residents import SPARE_ROUNDS, SPARE_ROUNDS_AHEAD
from pearl_ray.core.schedule import Limits
from pearl_ray.core.windows import WindowPolicy
from pearl_ray.model.grammar import GrammarCompiler
from pearl_ray.model.kv_cache import KVCache
from pearl_ray.model.loading import LoadedModel, Models, Role, load_model, open_models
from pearl_ray.model.runner import ModelRunner
from tests.together import Pace

TIMEOUT_S = 120.0  # loaded machines stall
MAX_WINDOW = 64
_CAPTURING = threading.Lock()


class PacedOutbox(Outbox):
    """An outbox that goes no faster than its pace."""

    pace: Pace

    def send(self, message: Message) -> None:
        super().send(message)
        self.pace.wait()


class LocalEngine:
    """Use as a context manager; :meth:`generate` answers prompts of token ids."""

    def __init__(
        self,
        dirs: tuple[Path, Path],
        *,
        mode: Mode = "pearl",
        draft_tp: int = 1,
        target_tp: int = 1,
        window: int = 4,
        dtype: str = "float64",
        num_blocks: int = 64,
        block_size: int = 16,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 256,
        max_model_len: int = 512,
        verification: str = "coupled",
        draft_grammars: bool = True,
        on_device: bool = False,
        device: str = "cpu",
        attention_backend: str = "torch",
        use_graphs: bool = False,
        deterministic: bool = False,
        most_ahead: int | None = None,
    ) -> None:
        """``on_device``: the loops, passes and samplers of GPUs; on a CPU with torch in the kernels' place.

        ``most_ahead``: rounds that the shards do before the coordinator has heard of them, on however slow a machine.
        """
        self._pace = Pace(most_ahead)
        self._draft_grammars, self._on_device = draft_grammars, on_device
        self._deterministic = deterministic
        self._device, self._backend, self._use_graphs = torch.device(device), attention_backend, use_graphs
        self.device_parts: list[DeviceParts] = []
        self._max_num_seqs, self._max_model_len = max_num_seqs, max_model_len
        self.target_loops: list[TargetLoop] = []
        self.draft_loops: list[DraftLoop] = []
        self._paths: dict[Role, str] = {"target": str(dirs[0]), "draft": str(dirs[1])}
        self._limits = Limits(mode, max_num_batched_tokens)
        self._sizes = (num_blocks, block_size)
        self._window = window
        self._dtype = dtype
        self.models: Models = open_models(*self._paths.values(), "", with_draft=mode != "ar")
        self._tp: dict[Role, int] = {"target": target_tp} if mode == "ar" else {"target": target_tp, "draft": draft_tp}
        self._folder = tempfile.mkdtemp(prefix="pearl-test-")
        self._inbox = Inbox(folder=self._folder)
        self._arenas = {name: arena_path(name) for name in ("target", "draft", "windows", "verdicts")}
        self._closing: list[object] = []
        self._numbers = itertools.count()
        self.errors: list[BaseException] = []
        pools = [BlockPool(num_blocks, block_size, prefix_caching=True) for _ in range(2)]
        self.controller = Controller(
            ControllerConfig(
                limits=self._limits,
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                max_waiting_requests=None,
                verification=verification,
                eos_token_ids=self.models.eos_token_ids,
                vocab_size=self.models.num_valid["target"],
                seed=0,
                spare_rounds=SPARE_ROUNDS_AHEAD if on_device else SPARE_ROUNDS,
            ),
            pools[0],
            pools[1] if mode != "ar" else None,
            WindowPolicy(mode, window, None),
            decode=self.models.tokenizer.decode,
            clock=time.monotonic,
        )
        self.pools = pools
        ranks: list[tuple[Role, int]] = [(role, rank) for role, size in self._tp.items() for rank in range(size)]
        self._inboxes = {key: Inbox(folder=self._folder) for key in ranks}
        self._outboxes = [Outbox(inbox.endpoint) for inbox in self._inboxes.values()]
        self._threads = [threading.Thread(target=self._shard, args=key, daemon=True) for key in ranks]
        for thread in self._threads:
            thread.start()

    def _shard(self, role: Role, rank: int) -> None:
        try:
            self._loop(role, rank).run()
        except BaseException as error:
            self.errors.append(error)

    def _loop(self, role: Role, rank: int) -> TargetLoop | DraftLoop:
        size = self._tp[role]
        transport = "shm" if size > 1 else "single"
        group = join_group(transport, self._arenas[role], rank, size, host=None, timeout_s=TIMEOUT_S)
        model = load_model(
            target_model=self._paths["target"],
            draft_model=self._paths["draft"],
            cache_dir="",
            role=role,
            rank=rank,
            group=group,
            dtype=self._dtype,
            device=self._device,
            attention_backend=self._backend,
            block_size=self._sizes[1],
            on_layer_loaded=lambda done, total: None,
            deterministic=self._deterministic,
        )
        num_blocks, block_size = self._sizes
        cache = model.make_cache(num_blocks, block_size)
        num_valid = self.models.num_valid[role]
        runner: ModelRunner
        parts = None
        if self._on_device:
            parts = self._make_parts(role, model, cache, group)
            runner = parts.runner
        else:
            runner = ModelRunner(model.transformer, cache, group, block_size=block_size, num_valid=num_valid)
        replica = Replica(self._limits, block_size)
        bridge = self._bridge(role, rank) if "draft" in self._tp else None
        inbox = self._inboxes[role, rank]
        outbox = None
        if rank == 0:
            outbox = PacedOutbox(self._inbox.endpoint) if role == "target" else Outbox(self._inbox.endpoint)
        if isinstance(outbox, PacedOutbox):
            outbox.pace = self._pace
        self._closing += [group, bridge, outbox]
        grammars = Grammars(lambda: GrammarCompiler(self.models.tokenizer, runner.num_valid))
        if role == "draft":
            assert bridge is not None
            epochs = FollowerEpochs(inbox, replica)
            own = grammars if self._draft_grammars else None
            steps = parts.steps if parts is not None else None
            drafting = DraftLoop(replica, epochs, runner, bridge, outbox, TIMEOUT_S, own, steps)
            self.draft_loops.append(drafting)
            return drafting
        followers = [Outbox(other.endpoint) for key, other in self._inboxes.items() if key != ("target", 0)]
        self._closing += followers
        target_epochs = FollowerEpochs(inbox, replica) if rank > 0 else LeaderEpochs(inbox, replica, followers)
        own_parts = (replica, target_epochs, runner, bridge, outbox if rank == 0 else None, TIMEOUT_S, grammars)
        if parts is not None:
            loop: TargetLoop = DeviceTargetLoop(*own_parts, parts.sampler, parts.verification)
        else:
            loop = TargetLoop(*own_parts)
        self.target_loops.append(loop)
        return loop

    def _make_parts(self, role: Role, model: LoadedModel, cache: KVCache, group: Group) -> DeviceParts:
        with _CAPTURING:  # one capture at a time: the threads share a device
            parts = make_parts(
                role,
                model.transformer,
                cache,
                group,
                block_size=self._sizes[1],
                num_valid=self.models.num_valid[role],
                max_num_seqs=self._max_num_seqs,
                max_model_len=self._max_model_len,
                max_window=MAX_WINDOW,
                use_graphs=self._use_graphs,
            )
            capture(role, parts, self._window + (self._limits.mode == "sd"), self._limits.max_num_batched_tokens)
        self.device_parts.append(parts)
        return parts

    def _bridge(self, role: Role, rank: int) -> Bridge:
        drafting = role == "draft"
        windows = verdicts = None
        if not drafting or rank == 0:
            windows = ShmMailbox(self._arenas["windows"], 0 if drafting else rank + 1, self._tp["target"])
        if drafting or rank == 0:
            verdicts = ShmMailbox(self._arenas["verdicts"], rank + 1 if drafting else 0, self._tp["draft"])
        return Bridge(windows, verdicts, TIMEOUT_S)

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        return GrammarCompiler(self.models.tokenizer, self.models.num_valid["target"])

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Queue one request; one whose grammar is no good is refused, as by the coordinator."""
        if params.structured_outputs is not None:
            self._compiler.check(params.structured_outputs)
        request = self.controller.submit(f"r{next(self._numbers)}", None, prompt, params)
        self.flush()
        return request

    def flush(self) -> None:
        """Send the controller's decisions to the shards."""
        diff = self.controller.take_diff()
        if diff is not None:
            for outbox in self._outboxes:
                outbox.send(diff)

    def wait_until_up(self) -> None:
        """Until every shard has its loop."""
        while len(self.target_loops) + len(self.draft_loops) < len(self._threads):
            if self.errors:
                raise self.errors[0]
            time.sleep(0.01)

    def run(self) -> None:
        """Hear of rounds until every request has ended."""
        while self.controller.requests:
            message = self._inbox.receive(5.0)
            if self.errors:
                raise self.errors[0]
            if isinstance(message, RoundSummary):
                self.controller.on_round(message)
            elif isinstance(message, DraftSummary):
                self.controller.on_draft(message)
            self.flush()
            if isinstance(message, RoundSummary):
                self._pace.hear()

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Request]:
        """Answer all prompts together."""
        requests = [self.submit(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        self.run()
        return requests

    def close(self) -> None:
        """Stop the loops; raises what one of them died of."""
        self._pace.hear(1 << 30)
        self._outboxes[0].send(Stop())
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        for thing in [*self._closing, *self._outboxes, *self._inboxes.values(), self._inbox]:
            if thing is not None:
                thing.close()  # type: ignore[attr-defined]
        if self.errors:
            raise self.errors[0]

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
