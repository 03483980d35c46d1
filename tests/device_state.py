"""Which implementation of the device's state machine the tests drive: torch's, or the kernels' where those can run.

The kernels run on a GPU, and on a CPU under Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import os

import torch
from hypothesis import settings

from pearl_ray.kernels.advance import advance_reference
from pearl_ray.kernels.draft_step import feed_reference

_RUNS_KERNELS = os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("PEARL_TEST_KERNELS") == "1"

if _RUNS_KERNELS:
    settings.register_profile("kernels", deadline=None, max_examples=25)
    settings.load_profile("kernels")
    from pearl_ray.kernels.advance_kernel import advance as ADVANCE
    from pearl_ray.kernels.draft_step_kernel import feed as FEED
    from tests.kernel_checks import DEVICE
else:
    ADVANCE, FEED = advance_reference, feed_reference
    DEVICE = torch.device("cpu")

__all__ = ["ADVANCE", "DEVICE", "FEED"]
