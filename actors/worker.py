"""What a shard does from birth to death, apart from its rounds: meet its group, load, measure, allocate, connect, run.

The Ray shells (`draft_shard`, `target_shard`) add Ray and the role. Every method is called by the coordinator; those
marked collective are called on all ranks of the model at once.
"""

from __future__ import annotations

import gc
import os
import time

import psutil
import ray
import torch

from pearl_ray.actors import device
from pearl_ray.actors.device_target import DeviceTargetLoop
from pearl_ray.actors.draft_loop import DraftLoop
from pearl_ray.actors.epochs import Epochs, FollowerEpochs, LeaderEpochs
from pearl_ray.actors.grammars import Grammars
from pearl_ray.actors.logs import log_to_stderr
from pearl_ray.actors.spec import (
    DeploymentSpec,
    GroupWiring,
    Profile,
    Role,
    ShardInfo,
    Wiring,
)
from pearl_ray.actors.target_loop import TargetLoop
from pearl_ray.cluster.bridge import Bridge
from pearl_ray.cluster.channels import Inbox, Outbox
from pearl_ray.cluster.devices import device_key, open_device
from pearl_ray.cluster.meeting import StoreServer, join_group
from pearl_ray.core.comm import Group
from pearl_ray.core.replica import Replica
from pearl_ray.core.schedule import Limits
from pearl_ray.core.windows import MAX_WINDOW
from pearl_ray.kernels.sampler import make_sampler
from pearl_ray.model.batching import Entry
from pearl_ray.model.grammar import GrammarCompiler
from pearl_ray.model.graphs import GraphFigures
from pearl_ray.model.loading import LoadedModel, load_model, model_path
from pearl_ray.model.memory import Measured, ShardUsage
from pearl_ray.model.runner import ModelRunner
from pearl_ray.model.tokenizer import load_tokenizer
from pearl_ray.model.warm_up import PassSize, heaviest_sampling, used_and_total, warm_up

TARGET_ROWS = (1, 4, 16, 64)
DRAFT_SEQUENCES = (1, 4, 16)
PROFILE_REPEATS = 2
PROFILE_CONTEXT = 64  # tokens of context in the measured passes
BUFFER_BYTES = 1 << 29  # set aside for the fixed buffers of passes, logits above all; beside them, for CUDA graphs
SETTLED_ROWS = 64  # passes of up to so many rows have their linear maps measured; more are cuBLAS's
CPU_PASS = PassSize(max_tokens=16, max_sequences=2, rows_per_sequence=4, max_context=64)  # proves that a pass runs


class ShardWorker:
    """One rank of one model.

    Attributes:
        layers: (loaded, in all), for progress bars.
        parts: what rounds on a GPU are made of; None on a CPU, whose rounds the host leads.
    """

    def __init__(self, spec: DeploymentSpec, role: Role, rank: int) -> None:
        log_to_stderr()
        self.spec = spec
        self.role: Role = role
        self.rank = rank
        self.layers = (0, 0)
        self.runner: ModelRunner | None = None
        self.parts: device.DeviceParts | None = None
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

    def load(self, wiring: GroupWiring) -> None:
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
            max_model_len=spec.max_model_len,
            deterministic=spec.deterministic,
            on_layer_loaded=self._count_layer,
        )

    def _count_layer(self, done: int, total: int) -> None:
        self.layers = (done, total)

    def settle(self) -> None:
        """Choose how each linear map is computed, by measurement. Models that share a device settle one at a time."""
        assert self._model is not None
        self._model.transformer.settle(SETTLED_ROWS)

    def measure(self, num_valid: int, max_model_len: int) -> Measured:
        """Run the largest pass that the settings allow and say what it takes, and what else is taken.

        Collective, and apart from :meth:`load`, as ranks may take long to load but not to meet. Colocated models
        measure one after the other: each sees the other's weights, and not its pass. On a CPU the pass is a small one
        and the cache's budget is a share of the free memory, stated in `bringup`.
        """
        assert self._model is not None and self._group is not None
        spec, on_gpu = self.spec, self._device.type == "cuda"
        temporary = warm_up(
            self._model,
            self._group,
            self._pass_size(max_model_len) if on_gpu else CPU_PASS,
            block_size=spec.block_size,
            num_valid=num_valid,
            judge=heaviest_sampling(
                self.role, make_sampler(self._device, self._group, self._model.transformer.vocab_sizes, num_valid)
            ),
        )
        used, total = used_and_total(self._device) if on_gpu else (0, self._free_bytes())
        usage = ShardUsage(
            temporary_bytes=temporary,
            graph_bytes=(BUFFER_BYTES + (0 if spec.enforce_eager else device.GRAPH_BYTES)) if on_gpu else 0,
            bytes_per_block=self._model.bytes_per_block(spec.block_size),
        )
        return Measured(total_bytes=total, used_bytes=used, shard=usage)

    def _pass_size(self, max_model_len: int) -> PassSize:
        spec, window = self.spec, 0
        if self.role == "target" and spec.mode != "ar":
            window = MAX_WINDOW if spec.num_speculative_tokens is None else spec.num_speculative_tokens
        return PassSize(
            max_tokens=spec.max_num_batched_tokens,
            max_sequences=spec.max_num_seqs,
            rows_per_sequence=window + 1,
            max_context=max_model_len,
        )

    @property
    def _max_window(self) -> int:
        return MAX_WINDOW if self.spec.num_speculative_tokens is None else self.spec.num_speculative_tokens

    def allocate(self, num_blocks: int, num_valid: int, max_model_len: int) -> None:
        """Make the KV cache of ``num_blocks`` blocks; ids from ``num_valid`` on are never chosen.

        On GPUs collective: CUDA graphs are captured.
        """
        assert self._model is not None and self._group is not None
        spec, transformer = self.spec, self._model.transformer
        cache = self._model.make_cache(num_blocks, spec.block_size)
        if self._device.type == "cpu":
            self.runner = ModelRunner(transformer, cache, self._group, block_size=spec.block_size, num_valid=num_valid)
            return
        self.parts = device.make_parts(
            self.role,
            transformer,
            cache,
            self._group,
            block_size=spec.block_size,
            num_valid=num_valid,
            max_num_seqs=spec.max_num_seqs,
            max_model_len=max_model_len,
            max_window=device.MOST_DRAFTED,
            use_graphs=device.can_capture(self._group, spec.attention_backend, enforce_eager=spec.enforce_eager),
        )
        self.runner = self.parts.runner
        # Of a verification's rows: PEARL's pending tokens and the committed one, or SD's window and the bonus.
        widest = 1 if spec.mode == "ar" else self._max_window + (spec.mode == "sd")
        most = spec.max_num_batched_tokens
        device.capture(self.role, self.parts, widest, most, deterministic=spec.deterministic)

    @torch.inference_mode()
    def profile(self, num_blocks: int) -> Profile:
        """Measure forward passes, the best of a few each. Collective; writes into the still unused cache.

        The target's by query rows of one sequence; the draft's by sequences of one row each.
        """
        assert self.runner is not None
        if self.parts is not None:
            return Profile(seconds=device.profile(self.role, self.parts, num_blocks, PROFILE_CONTEXT))
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
                times.append(time.monotonic() - began)
            seconds[size] = min(times)
        return Profile(seconds=seconds)

    def graphs(self) -> GraphFigures | None:
        """What capturing CUDA graphs has cost this rank; None on a CPU."""
        return self.parts.runner.graphs.figures if self.parts is not None else None

    # -- the rounds -------------------------------------------------------------------------------------------------

    def open_inbox(self, folder: str | None) -> str:
        """Bind this shard's inbox, in a folder of this host or (None) on TCP; returns its endpoint."""
        self._inbox = Inbox(folder=folder) if folder is not None else Inbox(self._ip)
        return self._inbox.endpoint

    def connect(self, wiring: Wiring) -> None:
        """Connect to coordinator and followers; the bridge is open by now (see ``bridging``)."""
        assert self._inbox is not None
        epochs: Epochs
        if (self.role, self.rank) == ("target", 0):
            followers = [self._outbox(endpoint) for endpoint in wiring.followers]
            epochs = LeaderEpochs(self._inbox, self.replica, followers)
        else:
            epochs = FollowerEpochs(self._inbox, self.replica)
        self._loop = self._make_loop(epochs, self._outbox(wiring.coordinator) if self.rank == 0 else None)
        if self.role == "target" or self.parts is None:  # a GPU's draft steps don't wait for the host
            self._loop.grammars = Grammars(self._grammar_compiler)

    def _make_loop(self, epochs: Epochs, coordinator: Outbox | None) -> TargetLoop | DraftLoop:
        """The role's rounds."""
        assert self.runner is not None
        timeout_s, parts = self.spec.round_timeout_s, self.parts
        if self.role == "draft":
            assert self.bridge is not None
            steps = parts.steps if parts is not None else None
            return DraftLoop(self.replica, epochs, self.runner, self.bridge, coordinator, timeout_s, steps=steps)
        common = (self.replica, epochs, self.runner, self.bridge, coordinator, timeout_s)
        if parts is None:
            return TargetLoop(*common)
        return DeviceTargetLoop(*common, sampler=parts.sampler, verification=parts.verification)

    def _grammar_compiler(self) -> GrammarCompiler:
        """Made when the first request with a grammar comes: the tokenizer takes a second or two to load."""
        assert self.runner is not None
        path = model_path("target", self.spec.target_model, self.spec.cache_dir)
        return GrammarCompiler(load_tokenizer(path), self.runner.num_valid)

    def _outbox(self, endpoint: str) -> Outbox:
        outbox = Outbox(endpoint)
        self._outboxes.append(outbox)
        return outbox

    def run(self) -> int:
        """Do rounds until the deployment stops; returns how many."""
        assert self._loop is not None
        return self._loop.run()

    @ray.method(concurrency_group="control")
    def progress(self) -> tuple[int, int]:
        """Layers loaded, layers in all."""
        return self.layers

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """Give back sockets and shared memory; the loop must have ended."""
        if self.bridge is not None:
            self.bridge.close()
        # CUDA graphs with the group's sums in them keep NCCL's communicator from ending.
        self._loop = self.runner = self.parts = None
        gc.collect()
        if self._group is not None:
            self._group.close()
        for outbox in self._outboxes:
            outbox.close()
        if self._inbox is not None:
            self._inbox.close()
