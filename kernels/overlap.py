"""Launches that begin while the kernels before them still run: programmatic dependent launch, from sm_90 on.

A kernel launched with ``OVERLAPPED`` calls :func:`follow` in every program, before it reads or writes anything but
weights and other constants: only then all that earlier kernels of the stream wrote is there, and all that they read was
read. Several kernels may be waiting at once, so nothing else can be relied on before. See the CUDA programming guide,
"Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def _can_overlap() -> bool:
    if triton.knobs.runtime.interpret:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)


_ON = tl.constexpr(_can_overlap())
OVERLAPPED = {"launch_pdl": True} if _ON.value else {}


@triton.jit
def follow():
    """Lets the next kernel begin, then waits for the one before this to end.

    In this order, so that a kernel may be waiting while the two before it still run: it ends after the one it waits
    for has ended, which has waited likewise. The next one begins only once all programs of this one have begun, so
    nothing that waits can keep what it waits for from running.
    """
    if _ON:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
