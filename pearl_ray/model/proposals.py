"""What tested tokens were drawn from, row by row on the device, in one copy a round. Knows rows; knows no rounds.

All that a verdict needs come from the host with that verdict, those of tokens drafted in an earlier round too. The host
holds them beside its pending tokens; a round tests as many tokens as a window has, so these are no more bytes than if
each new window were sent and kept on the device; and nothing can be left there of a round that went another way.

Shapes: R rows of a pass, K = 64 entries of a proposal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pearl_ray.core.messages import MAX_PROPOSALS
from pearl_ray.core.phases import Proposal
from pearl_ray.kernels.sampler import Proposals

_ENTRIES_BYTES = MAX_PROPOSALS * 4  # of a row's ids; as many of its probabilities


class ProposalRows:
    """Room for the proposals of ``max_rows`` rows. The host's side may be written again when the copy is done."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        size = max_rows * (2 * _ENTRIES_BYTES + 1)
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._flat = self._host.numpy()

    def send(self, num_rows: int, starts: Sequence[int], proposals: Sequence[Sequence[Proposal]]) -> Proposals:
        """Queue the copy; each sequence's ``proposals`` are those of its rows from ``starts`` on.

        Rows without one keep what the buffer held, and say that they aren't the rejection rule's.
        """
        ids_end = num_rows * _ENTRIES_BYTES
        end = 2 * ids_end
        host_ids = self._flat[:ids_end].view(np.int32).reshape(num_rows, MAX_PROPOSALS)
        host_probs = self._flat[ids_end:end].view(np.float32).reshape(num_rows, MAX_PROPOSALS)
        is_rejection = self._flat[end : end + num_rows]
        is_rejection[:] = 0
        for start, some in zip(starts, proposals, strict=True):
            for row, (ids_K, probs_K) in enumerate(some, start):
                host_ids[row], host_probs[row] = ids_K, probs_K
            is_rejection[start : start + len(some)] = 1
        device = self._device[: end + num_rows]
        device.copy_(self._host[: end + num_rows], non_blocking=True)
        shape = (num_rows, MAX_PROPOSALS)
        return Proposals(
            device[:ids_end].view(torch.int32).view(shape),
            device[ids_end:end].view(torch.float32).view(shape),
            device[end:].view(torch.bool),
        )
