"""The ``Sampler`` made of the Triton kernels: nothing waits, so all of it can be captured in a CUDA graph.

Rows without filters race on every rank's slice of the vocabulary, and one (score, id) per rank and row is exchanged.
With filters, or under the rejection rule, the logits are gathered and every rank computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pearl_ray.core.comm import Group
from pearl_ray.kernels.filters import find_cuts
from pearl_ray.kernels.proposal import propose
from pearl_ray.kernels.race import Draws, judge, race, reduce
from pearl_ray.kernels.rejection import verify
from pearl_ray.kernels.sampler import Proposals, RowDraws


class TritonSampler:
    """See ``Sampler``."""

    def __init__(self, group: Group, vocab_sizes: Sequence[int], num_valid: int) -> None:
        self._group, self._vocab_sizes = group, list(vocab_sizes)
        self._num_valid = min(num_valid, sum(vocab_sizes))
        self._vocab_start = sum(vocab_sizes[: group.rank])

    def draw(self, logits_RV: torch.Tensor, draws: RowDraws) -> torch.Tensor:
        """See ``Sampler``."""
        best, ids = self._race(logits_RV, draws)
        return reduce(best, ids)[1][:, 0]

    def propose(self, logits_RV: torch.Tensor, draws: RowDraws) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See ``Sampler``."""
        whole_RV = self._gather(logits_RV)
        tokens, ids, probs = propose(whole_RV, self._cut(whole_RV, draws), num_valid=self._num_valid)
        return tokens.int(), ids, probs

    def judge(
        self,
        logits_RV: torch.Tensor,
        draws: RowDraws,
        row_start_S1: torch.Tensor,
        tested_R: torch.Tensor,
        max_rows: int,
        proposals: Proposals | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Sampler``."""
        if proposals is None:
            best, ids = self._race(logits_RV, draws)
            accepted, token, _ = judge(best, ids, row_start_S1, tested_R, max_rows)
        else:
            whole_RV = self._gather(logits_RV)
            accepted, token = verify(
                whole_RV,
                self._cut(whole_RV, draws),
                row_start_S1,
                tested_R,
                proposals.is_rejection,
                proposals.ids,
                proposals.probs,
                max_rows,
                num_valid=self._num_valid,
            )
        return accepted, token.int()

    def _race(self, logits_RV: torch.Tensor, draws: RowDraws) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates of each row: of the blocks of the vocabulary, or of the ranks."""
        if draws.is_filtered:
            whole_RV = self._gather(logits_RV)
            return race(whole_RV, self._cut(whole_RV, draws), num_valid=self._num_valid)
        best, ids = race(logits_RV, _plain(draws), vocab_start=self._vocab_start, num_valid=self._num_valid)
        if self._group.size == 1:
            return best, ids
        score_R1, id_R1 = reduce(best, ids)
        ones = [1] * self._group.size
        return self._group.all_gather(score_R1, ones), self._group.all_gather(id_R1, ones)

    def _gather(self, logits_RV: torch.Tensor) -> torch.Tensor:
        return self._group.all_gather(logits_RV.contiguous(), self._vocab_sizes)

    def _cut(self, whole_RV: torch.Tensor, draws: RowDraws) -> Draws:
        if not draws.is_filtered:
            return _plain(draws)
        cuts, last_ids = find_cuts(
            whole_RV,
            draws.temperatures,
            draws.top_ks,
            draws.top_ps,
            draws.min_ps,
            num_valid=self._num_valid,
            has_both=draws.has_both,
        )
        return Draws(draws.seeds, draws.positions, draws.samples, draws.temperatures, cuts, last_ids)


def _plain(draws: RowDraws) -> Draws:
    return Draws(draws.seeds, draws.positions, draws.samples, draws.temperatures)
