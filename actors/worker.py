"""What a shard does from birth to death, apart from its rounds: meet its group, load, measure, allocate, connect, run.

The Ray shells (`draft_shard`, `target_shard`) add Ray and the role's loop. Every method is called by the coordinator;
those marked collective are called on all ranks of the model at once.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod

import psutil
import ray
import torch

from pearl_ray.actors.draft_loop import DraftLoop
from pearl_ray.actors.epochs import Epochs, FollowerEpochs, LeaderEpochs
from pearl_ray.actors.grammars import Grammars
from pearl_ray.actors.spec import (
    DeploymentSpec,
    GroupWiring,
    MailboxWiring,
    Profile,
    Role,
    ShardFootprint,
    ShardInfo,
    Wiring,
)
from pearl_ray.actors.target_loop import TargetLoop
from pearl_ray.cluster.bridge import Bridge
from pearl_ray.cluster.channels import Inbox, Outbox
from pearl_ray.cluster.devices import device_key, open_device
from pearl_ray.cluster.mailbox import Mailbox
from pearl_ray.cluster.meeting import StoreServer, join_group, open_mailbox
from pearl_ray.core.comm import Group
from pearl_ray.core.replica import Replica
from pearl_ray.core.schedule import Limits
from pearl_ray.model.batching import Entry
from pearl_ray.model.grammar import GrammarCompiler
from pearl_ray.model.loading import LoadedModel, load_model, model_path
from pearl_ray.model.runner import ModelRunner
from pearl_ray.model.tokenizer import load_tokenizer

TARGET_ROWS = (1, 4, 16, 64)
DRAFT_SEQUENCES = (1, 4, 16)
PROFILE_REPEATS = 2
PROFILE_CONTEXT = 64  # tokens of context in the measured passes


class ShardWorker(ABC):
    """One rank of one model.

    Attributes:
        layers: (loaded, in all), for progress bars.
    """

    def __init__(self, spec: DeploymentSpec, role: Role, rank: int) -> None:
        self.spec = spec
        self.role: Role = role
        self.rank = rank
        self.layers = (0, 0)
        self.runner: ModelRunner | None = None
        self.bridge: Bridge | None = None
        self.replica = Replica(Limits(spec.mode, spec.max_num_batched_tokens), spec.block_size)
        self._device = open_device("cuda" if spec.device == "cuda" else "cpu")
        self._ip = ray.util.get_node_ip_address()
        self._group: Group | None = None
        self._model: LoadedModel | None = None
        self._inbox: Inbox | None = None
        self._outboxes: list[Outbox] = []
        self._loop: TargetLoop | DraftLoop | None = None
        self._stores: list[StoreServer] = []

    def info(self) -> ShardInfo:
        """Where this shard runs."""
        return ShardInfo(
            role=self.role,
            rank=self.rank,
            key=device_key(ray.get_runtime_context().get_node_id(), self._device),
            ip=self._ip,
            pid=os.getpid(),
            device=self._device.type,
            free_bytes=self._free_bytes(),
        )

    # -- the model --------------------------------------------------------------------------------------------------

    def open_store(self) -> str:
        """Open a store where others can meet; returns ``host:port``. It lives as long as this shard."""
        store = StoreServer(self._ip, self.spec.round_timeout_s)
        self._stores.append(store)
        return store.address

    def _free_bytes(self) -> int:
        """What this shard's device has left to use, all shards on it together."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return int(free - (1 - self.spec.gpu_memory_utilization) * total)
        return psutil.virtual_memory().available

    def load(self, wiring: GroupWiring) -> ShardFootprint:
        """Meet the group and load this rank's part of the weights. Collective."""
        spec = self.spec
        self._group = join_group(
            wiring.transport,
            wiring.meeting_point,
            self.rank,
            spec.tp(self.role),
            host=self._ip,
            timeout_s=spec.round_timeout_s,
        )
        self._model = load_model(
            target_model=spec.target_model,
            draft_model=spec.draft_model,
            cache_dir=spec.cache_dir,
            role=self.role,
            rank=self.rank,
            group=self._group,
            dtype=spec.dtype,
            device=self._device,
            attention_backend=spec.attention_backend,
            block_size=spec.block_size,
            on_layer_loaded=self._count_layer,
        )
        return ShardFootprint(
            bytes_per_block=self._model.bytes_per_block(spec.block_size),
            free_bytes=self._free_bytes(),
        )

    def _count_layer(self, done: int, total: int) -> None:
        self.layers = (done, total)

    def allocate(self, num_blocks: int, num_valid: int) -> None:
        """Make the KV cache of ``num_blocks`` blocks; ids from ``num_valid`` on are never chosen."""
        assert self._model is not None and self._group is not None
        cache = self._model.make_cache(num_blocks, self.spec.block_size)
        self.runner = ModelRunner(
            self._model.transformer, cache, self._group, block_size=self.spec.block_size, num_valid=num_valid
        )

    @torch.inference_mode()
    def profile(self, num_blocks: int) -> Profile:
        """Measure forward passes, the best of a few each. Collective; writes into the still unused cache.

        The target's by query rows of one sequence; the draft's by sequences of one row each.
        """
        assert self.runner is not None
        seconds: dict[int, float] = {}
        blocks = list(range(min(num_blocks, -(-(PROFILE_CONTEXT + TARGET_ROWS[-1]) // self.spec.block_size))))
        start = min(PROFILE_CONTEXT, len(blocks) * self.spec.block_size // 2)
        for size in TARGET_ROWS if self.role == "target" else DRAFT_SEQUENCES:
            if self.role == "target":
                if start + size > len(blocks) * self.spec.block_size:
                    break
                entries = [Entry([0] * size, start, blocks, size)]
            else:
                entries = [Entry([0], start, blocks, 1)] * size
            times = []
            for _ in range(PROFILE_REPEATS):
                began = time.monotonic()
                self.runner.logits(entries)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                times.append(time.monotonic() - began)
            seconds[size] = min(times)
        return Profile(seconds=seconds)

    # -- the rounds -------------------------------------------------------------------------------------------------

    def open_inbox(self, folder: str | None) -> str:
        """Bind this shard's inbox, in a folder of this host or (None) on TCP; returns its endpoint."""
        self._inbox = Inbox(folder=folder) if folder is not None else Inbox(self._ip)
        return self._inbox.endpoint

    def connect(self, wiring: Wiring) -> None:
        """Connect to coordinator, followers and bridge. Called on all shards at once: mailboxes wait for each other."""
        assert self._inbox is not None
        if wiring.windows is not None and wiring.verdicts is not None:
            drafting = self.role == "draft"
            windows = self._mailbox(wiring.windows, writes=drafting)
            verdicts = self._mailbox(wiring.verdicts, writes=not drafting)
            self.bridge = Bridge(windows, verdicts, self.spec.round_timeout_s)
        epochs: Epochs
        if (self.role, self.rank) == ("target", 0):
            followers = [self._outbox(endpoint) for endpoint in wiring.followers]
            epochs = LeaderEpochs(self._inbox, self.replica, followers)
        else:
            epochs = FollowerEpochs(self._inbox, self.replica)
        self._loop = self.make_loop(wiring, epochs)
        if self.role == "target" or self._device.type == "cpu":  # a GPU's draft steps don't wait for the host
            self._loop.grammars = Grammars(self._grammar_compiler)

    def _grammar_compiler(self) -> GrammarCompiler:
        """Made when the first request with a grammar comes: the tokenizer takes a second or two to load."""
        assert self.runner is not None
        path = model_path("target", self.spec.target_model, self.spec.cache_dir)
        return GrammarCompiler(load_tokenizer(path), self.runner.num_valid)

    def _mailbox(self, wiring: MailboxWiring, *, writes: bool) -> Mailbox | None:
        """This shard's end: the leader writes (party 0), every rank of the other model reads (its rank + 1)."""
        if writes and self.rank > 0:
            return None
        party = 0 if writes else self.rank + 1
        return open_mailbox(
            wiring.transport,
            wiring.meeting_point,
            party,
            wiring.num_readers,
            host=self._ip,
            timeout_s=self.spec.round_timeout_s,
        )

    def _outbox(self, endpoint: str) -> Outbox:
        outbox = Outbox(endpoint)
        self._outboxes.append(outbox)
        return outbox

    def to_coordinator(self, wiring: Wiring) -> Outbox | None:
        """Where a leader's summaries go."""
        return self._outbox(wiring.coordinator) if self.rank == 0 else None

    @abstractmethod
    def make_loop(self, wiring: Wiring, epochs: Epochs) -> TargetLoop | DraftLoop:
        """The role's loop."""

    def run(self) -> int:
        """Do rounds until the deployment stops; returns how many."""
        assert self._loop is not None
        return self._loop.run()

    def release(self) -> None:
        """Give back sockets and shared memory."""
        if self.bridge is not None:
            self.bridge.close()
        if self._group is not None:
            self._group.close()
        for outbox in self._outboxes:
            outbox.close()
        if self._inbox is not None:
            self._inbox.close()
