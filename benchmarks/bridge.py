"""What a message over the bridge costs: python -m benchmarks.bridge

Starts a draft leader and target ranks as processes and sends windows one way and verdicts the other, as in a round,
over each transport that the machine has: shared memory and gloo, and NCCL where there is a GPU for each process. Prints
the round trip (arrays to arrays, both directions together) in microseconds per batch of sequences x window, without and
with `rejection`'s 64 proposals per token, the best median of several trials, since other work on the machine only adds;
and how long each transport took to open.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection

import torch

from pearl_ray.cluster.bridge import Bridge
from pearl_ray.cluster.bridge_choice import frame_sizes, measure_round_trip
from pearl_ray.cluster.devices import Transport
from pearl_ray.cluster.meeting import StoreServer, open_mailbox
from pearl_ray.cluster.shm import arena_path

TIMEOUT_S = 60.0
TRIALS = 20
Case = tuple[int, int, bool]  # sequences, window, rejection


def party(
    result: Connection,
    transport: Transport,
    points: tuple[str, str],
    index: int,
    num_targets: int,
    cases: list[Case],
    budget_s: float,
) -> None:
    """One process: 0 is the draft's leader, the others are target ranks; sends (seconds to open, round trips)."""
    torch.set_num_threads(1)
    if transport == "nccl":
        torch.cuda.set_device(index)
    largest = max(sequences * window for sequences, window, _ in cases)
    frames = frame_sizes(largest // max(w for _, w, _ in cases), max(w for _, w, _ in cases))
    started = time.perf_counter()
    bridge = Bridge(None, None, TIMEOUT_S)
    bridge.windows = open_mailbox(
        transport, points[0], index, num_targets, host="127.0.0.1", timeout_s=TIMEOUT_S, frame_bytes=frames[0]
    )
    if index <= 1:  # the draft's leader reads what the target's leader writes
        bridge.verdicts = open_mailbox(
            transport, points[1], 1 - index, 1, host="127.0.0.1", timeout_s=TIMEOUT_S, frame_bytes=frames[1]
        )
    opened_s = time.perf_counter() - started
    trips: list[float] = []
    for sequences, window, rejection in cases:
        trials = [
            measure_round_trip(
                bridge,
                "draft" if index == 0 else "target",
                max(index - 1, 0),
                num_sequences=sequences,
                window=window,
                rejection=rejection,
                budget_s=budget_s,
                timeout_s=TIMEOUT_S,
            )
            for _ in range(TRIALS)
        ]
        trips.append(min(seconds for seconds in trials if seconds is not None) if index == 0 else 0.0)
    bridge.close()
    if index == 0:
        result.send((opened_s, trips))
    result.close()


def measure(transport: Transport, num_targets: int, cases: list[Case], budget_s: float) -> tuple[float, list[float]]:
    """(Seconds to open both directions, best seconds of a round trip per case) over one transport."""
    processes = multiprocessing.get_context("spawn")
    server = StoreServer("127.0.0.1", TIMEOUT_S)
    if transport == "shm":
        points = arena_path("windows"), arena_path("verdicts")
    else:
        points = f"{server.address}/windows", f"{server.address}/verdicts"
    receive, send = processes.Pipe(duplex=False)
    parties = [
        processes.Process(target=party, args=(send, transport, points, index, num_targets, cases, budget_s))
        for index in range(1 + num_targets)
    ]
    for process in parties:
        process.start()
    send.close()
    try:
        opened_s, trips = receive.recv()
    except EOFError:
        raise SystemExit(f"{transport}: a process ended before it measured; its error stands above") from None
    finally:
        for process in parties:
            process.join(TIMEOUT_S)
            if process.is_alive():
                process.kill()
    return opened_s, trips


def main() -> None:
    """Measure each transport and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transport", action="append", choices=("shm", "gloo", "nccl"), help="default: all there are")
    parser.add_argument("--targets", type=int, default=1, help="target ranks; with NCCL each takes a GPU")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="per case and transport")
    args = parser.parse_args()
    num_gpus = torch.cuda.device_count() if torch.distributed.is_nccl_available() else 0
    transports: list[Transport] = args.transport or ["shm", "gloo", *(["nccl"] if num_gpus > args.targets else [])]
    if "nccl" in transports and num_gpus <= args.targets:
        raise SystemExit(f"NCCL needs {args.targets + 1} GPUs here, one per process, and there are {num_gpus}")
    cases: list[Case] = [(n, args.window, rejection) for rejection in (False, True) for n in args.sequences]
    names = [f"{n}x{w}{' +64 proposals' if rejection else ''}" for n, w, rejection in cases]
    print(f"{args.targets} target ranks; round trips in µs (window one way, verdict back)")
    print(f"{'transport':>10} {'open ms':>8} " + " ".join(f"{name:>{max(len(name), 8)}}" for name in names))
    for transport in transports:
        opened_s, trips = measure(transport, args.targets, cases, args.seconds / TRIALS)
        figures = " ".join(f"{1e6 * s:>{max(len(name), 8)}.0f}" for s, name in zip(trips, names, strict=True))
        print(f"{transport:>10} {1e3 * opened_s:>8.0f} {figures}", flush=True)


if __name__ == "__main__":
    main()
