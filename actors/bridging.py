"""A shard's ends of the bridge: opened over one transport or several, measured, one taken. Called by the bring-up.

Knows who reads and who writes. The choice is the coordinator's (`bringup`), from what the draft's leader measured.
"""

from __future__ import annotations

import ray

from pearl_ray.actors.spec import BridgeWiring, MailboxWiring
from pearl_ray.actors.worker import ShardWorker
from pearl_ray.cluster.bridge import Bridge
from pearl_ray.cluster.bridge_choice import MOST_TRIAL_SEQUENCES, TYPICAL_WINDOW, BridgeTrial, measure_round_trip
from pearl_ray.cluster.devices import Transport
from pearl_ray.cluster.mailbox import Mailbox
from pearl_ray.cluster.meeting import open_mailbox

TRIAL_TIMEOUT_S = 10.0
GPU_SPIN_S = 0.02  # a round's wait: a GPU's shard has cores of its own, and its device waits with it
CPU_SPIN_S = 50e-6


def open_bridge(worker: ShardWorker, wiring: BridgeWiring) -> float | None:
    """Open this shard's ends over one transport; the seconds of a round trip, at the draft's leader, in a trial.

    Called on all shards at once: mailboxes wait for each other.

    Raises:
        TimeoutError, ConnectionError, RuntimeError: it can't be had here; what was opened is closed.
    """
    drafting = worker.role == "draft"
    bridge = Bridge(None, None, worker.spec.round_timeout_s)
    try:
        bridge.windows = _open_end(worker, wiring.windows, writes=drafting)
        bridge.verdicts = _open_end(worker, wiring.verdicts, writes=not drafting)
        seconds = _measure(worker, bridge) if wiring.trial else None
    except BaseException:
        bridge.abort()
        bridge.close()
        raise
    if not isinstance(worker.bridge, BridgeTrial):
        worker.bridge = BridgeTrial(None, None)
    worker.bridge.over[wiring.windows.transport] = bridge
    return seconds


def take_bridge(worker: ShardWorker, transport: Transport) -> None:
    """Keep the bridge over ``transport`` for the rounds."""
    assert isinstance(worker.bridge, BridgeTrial)
    worker.bridge = worker.bridge.take(transport)


def _open_end(worker: ShardWorker, wiring: MailboxWiring, *, writes: bool) -> Mailbox | None:
    """The leader writes (party 0), every rank of the other model reads (its rank + 1)."""
    if writes and worker.rank > 0:
        return None
    return open_mailbox(
        wiring.transport,
        wiring.meeting_point,
        0 if writes else worker.rank + 1,
        wiring.num_readers,
        host=ray.util.get_node_ip_address(),
        timeout_s=worker.spec.round_timeout_s,
        frame_bytes=wiring.frame_bytes,
        behind_queue=worker.spec.tp(worker.role) > 1,
        spin_s=GPU_SPIN_S if worker.spec.device == "cuda" else CPU_SPIN_S,
    )


def _measure(worker: ShardWorker, bridge: Bridge) -> float | None:
    spec = worker.spec
    return measure_round_trip(
        bridge,
        worker.role,
        worker.rank,
        num_sequences=min(spec.max_num_seqs, MOST_TRIAL_SEQUENCES),
        window=spec.num_speculative_tokens or TYPICAL_WINDOW,
        rejection=spec.verification == "rejection",
        timeout_s=min(TRIAL_TIMEOUT_S, spec.round_timeout_s),
    )
