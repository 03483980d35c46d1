"""Memory of processes and GPUs over time, and whether it grew; all read from outside, without a CUDA context.

Host memory is what a process holds resident (from /proc). Device memory is what the watched processes take of a GPU by
NVML's count; where it doesn't know them, or Python has no NVML, all that is taken, by whomever. In MiB. Knows nothing
of engines or load.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
SAMPLE_S = 1.0
BASELINE_S = (60.0, 120.0)  # the second minute
JUDGED_FROM_S = 180.0  # a shorter run is over before memory is level
HOST_GROWTH = 0.10  # of what a process held in the second minute
DEVICE_GROWTH_MIB = 64.0

Samples = Sequence[tuple[float, float]]  # seconds since the load began, MiB


@dataclass(frozen=True, slots=True)
class Growth:
    """What was held at the start, in the second minute and at the end, and how much more is allowed; in MiB."""

    name: str
    start: float
    before: float
    after: float
    allowed: float

    @property
    def is_too_much(self) -> bool:
        """Whether the end is above the second minute by more than is allowed."""
        return self.after - self.before > self.allowed


def growth_of(name: str, samples: Samples, duration: float, *, is_device: bool) -> Growth:
    """Medians of the second minute and of the last twentieth of the run.

    Args:
        samples: in the order of time; at least one.
        duration: seconds of load; in a run shorter than ``JUDGED_FROM_S`` the middle third is the second minute.
    """
    first, last = BASELINE_S if duration >= JUDGED_FROM_S else (duration / 3, duration * 2 / 3)
    before = _median(samples, first, last)
    after = _median(samples, duration - max(duration / 20, 2 * SAMPLE_S), duration + SAMPLE_S)
    allowed = DEVICE_GROWTH_MIB if is_device else HOST_GROWTH * before
    return Growth(name, samples[0][1], before, after, allowed)


def _median(samples: Samples, first: float, last: float) -> float:
    within = [mib for when, mib in samples if first <= when <= last]
    return statistics.median(within or [min(samples, key=lambda s: abs(s[0] - last))[1]])


class Memory:
    """Samples of all processes and GPUs.

    Args:
        pids: processes by what they are called.
        gpus: UUIDs of the GPUs.
        shown: processes that are in the table and aren't judged.
    """

    def __init__(
        self, pids: Mapping[str, int], gpus: Iterable[str] = (), shown: Mapping[str, int] | None = None
    ) -> None:
        self._shown = dict(shown or {})
        self._hosts = {name: _resident(pid) for name, pid in {**pids, **self._shown}.items()}
        self._devices = {f"device {uuid[:8]}": device_reader(uuid, set(pids.values())) for uuid in gpus}
        self.samples: dict[str, list[tuple[float, float]]] = {name: [] for name in (*self._hosts, *self._devices)}

    def sample(self, now: float) -> None:
        """Add one of each, ``now`` seconds after the start of the load.

        Raises:
            OSError, subprocess.SubprocessError: a process is gone, or the device's figure can't be had.
        """
        for name, read in (self._hosts | self._devices).items():
            self.samples[name].append((now, read()))

    async def watch(self, began: float) -> None:
        """Sample until cancelled; ``began`` on the monotonic clock."""
        while True:
            await asyncio.to_thread(self.sample, time.monotonic() - began)
            await asyncio.sleep(SAMPLE_S)

    def newest(self) -> str:
        """The last figures, in a line."""
        return ", ".join(f"{name} {samples[-1][1]:.0f}" for name, samples in self.samples.items())

    def report(self, duration: float) -> list[str]:
        """Print a table; returns what grew, nothing where the run was too short to judge."""
        is_judged = duration >= JUDGED_FROM_S
        grown = []
        print(f"\n{'MiB':20} {'start':>9} {'second minute' if is_judged else 'middle third':>14} {'end':>9}    growth")
        for name, samples in self.samples.items():
            is_device = name in self._devices
            g = growth_of(name, samples, duration, is_device=is_device)
            more = g.after - g.before
            growth = f"{more:+8.1f}" + ("" if is_device else f"  ({more / g.before:+.1%})")
            note = "  (shown only)" if name in self._shown else ""
            print(f"{name:20} {g.start:9.1f} {g.before:14.1f} {g.after:9.1f}  {growth}{note}")
            if is_judged and not note and g.is_too_much:
                grown.append(f"memory: {name} grew from {g.before:.1f} to {g.after:.1f} MiB")
        if not is_judged:
            print(f"(not judged: a run shorter than {JUDGED_FROM_S:g} s)")
        return grown


def _resident(pid: int) -> Callable[[], float]:
    statm, page = Path(f"/proc/{pid}/statm"), os.sysconf("SC_PAGE_SIZE")
    return lambda: int(statm.read_text().split()[1]) * page / MIB


def children_of(parent: int, programs: Sequence[str]) -> dict[str, int]:
    """Processes that ``parent`` started, by the names of these programs; of several of a name, one."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = stat.read_text().partition(" (")
        except OSError:
            continue  # it has ended
        name, _, fields = rest.rpartition(") ")
        if name in programs and int(fields.split()[1]) == parent:
            found[name] = int(pid)
    return found


def device_reader(uuid: str, pids: Container[int] = ()) -> Callable[[], float]:
    """What reads the MiB in use on a GPU, by its UUID with or without "GPU-": by these processes, where known."""
    gpu = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return lambda: _ask_nvidia_smi(gpu)
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByUUID(gpu)

    def read() -> float:
        own = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid in pids]
        known = [used for used in own if used is not None]
        return float(sum(known) or nvml.nvmlDeviceGetMemoryInfo(handle).used) / MIB

    return read


def _ask_nvidia_smi(gpu: str) -> float:
    command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return float(done.stdout.strip())
