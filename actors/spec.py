"""What a deployment's actors are told when they are made, and what they say of themselves. Plain data, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pearl_ray.cluster.bridge_choice import BridgeOption
from pearl_ray.cluster.devices import DeviceKey, Transport
from pearl_ray.cluster.framed_mailbox import FRAME_BYTES
from pearl_ray.core.params import Verification
from pearl_ray.core.phases import Mode

Role = Literal["draft", "target"]


@dataclass(frozen=True, kw_only=True)
class DeploymentSpec:
    """A deployment with every choice made; sizes in tokens, sequences or blocks as their names say.

    Attributes:
        target_model, draft_model: paths or Hub names; None: the embedded pair, found in or fetched to ``cache_dir``.
        num_speculative_tokens: a fixed window; None: chosen from measured costs.
        max_model_len: None: what the models allow.
        kv_cache_blocks: None: sized from free memory.
        bridge: its transport; "auto": of those that the placement allows, the one that measures fastest.
        min_decode_share: of their speed, while long prompts are prefilled; 0: prompts aren't paced.
    """

    name: str
    target_model: str | None
    draft_model: str | None
    cache_dir: str
    mode: Mode
    verification: Verification
    num_speculative_tokens: int | None
    dtype: str
    device: str
    attention_backend: str
    target_tp: int
    draft_tp: int
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting_requests: int | None
    gpu_memory_utilization: float
    block_size: int
    kv_cache_blocks: int | None
    enable_prefix_caching: bool
    enforce_eager: bool
    seed: int | None
    round_timeout_s: float
    colocate: bool = False
    deterministic: bool = False
    bridge: BridgeOption = "auto"
    min_decode_share: float = 0.75

    def tp(self, role: Role) -> int:
        """Shards of one model."""
        return self.target_tp if role == "target" else self.draft_tp

    @property
    def roles(self) -> tuple[Role, ...]:
        """The models there are."""
        return ("target",) if self.mode == "ar" else ("draft", "target")


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """Where a shard runs: ``key`` says which node and GPU, ``free_bytes`` what that device has left."""

    role: Role
    rank: int
    key: DeviceKey
    ip: str
    pid: int
    device: str
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class GroupWiring:
    """How the ranks of one model find each other (see ``cluster.meeting``)."""

    transport: Transport
    meeting_point: str = ""


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """What connects a shard to the others for its rounds, apart from the bridge, which is open by then.

    Attributes:
        coordinator: endpoint of the coordinator's inbox.
        followers: the target leader's: inboxes of all other shards.
    """

    coordinator: str
    followers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MailboxWiring:
    """One mailbox of the bridge: one leader writes, all ranks of the other model read.

    Attributes:
        frame_bytes: what a message takes in the usual case, header included.
    """

    transport: Transport
    meeting_point: str
    num_readers: int
    frame_bytes: int = FRAME_BYTES


@dataclass(frozen=True, kw_only=True)
class BridgeWiring:
    """Both mailboxes of the bridge over one transport; with ``trial`` they are measured once they are open."""

    windows: MailboxWiring
    verdicts: MailboxWiring
    trial: bool


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Seconds of a forward pass by its rows (target) or of a step by its sequences (draft)."""

    seconds: dict[int, float] = field(default_factory=dict)
