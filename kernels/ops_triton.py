"""A layer's operations in Triton (see ``LayerOps``): fused norms, the turn that stores, measured linear maps.

Nothing here waits for the device but :meth:`TritonLayerOps.settle`. Shapes as in ``ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from pearl_ray.kernels.activation import silu_mul
from pearl_ray.kernels.begin_pass import Begun, PassInput
from pearl_ray.kernels.begin_pass_kernel import begin_pass
from pearl_ray.kernels.linear import fixed_linear, gate_up_silu, linear
from pearl_ray.kernels.linear_choice import LinearChoices
from pearl_ray.kernels.norm import rms_norm
from pearl_ray.kernels.rotary import turn_and_store


class TritonLayerOps:
    """bfloat16 and float16 on CUDA.

    Deterministic: every linear map goes through one tile shape, whatever its number of rows, instead of the fastest
    way; the other operations compute each row by itself anyway.
    """

    name = "triton"
    reads_tables = True

    def __init__(self, *, deterministic: bool = False, choices: LinearChoices | None = None) -> None:
        self.deterministic = deterministic
        self.choices = choices or LinearChoices()

    def lay_out(self, weight_NK: torch.Tensor) -> torch.Tensor:
        """See ``LayerOps``."""
        return weight_NK

    def settle(self, weights: Iterable[torch.Tensor], num_rows: int, gate_ups: Iterable[torch.Tensor] = ()) -> None:
        """See ``LayerOps``. Compiles and measures each new shape: seconds; what isn't settled goes to cuBLAS."""
        if not self.deterministic:
            self.choices.settle(list(weights), num_rows, list(gate_ups))

    def settle_within(
        self,
        part: Callable[[int], Callable[[], object]],
        weights: Iterable[torch.Tensor],
        gate_ups: Iterable[torch.Tensor],
    ) -> None:
        """See ``LayerOps``. Seconds."""
        if not self.deterministic:
            self.choices.settle_within(part, weights, gate_ups)

    def begin_pass(
        self, given: PassInput, embedding_VD: torch.Tensor | None, norm_weight_D: torch.Tensor, eps: float
    ) -> Begun:
        """See ``LayerOps``: one launch."""
        return begin_pass(given, embedding_VD, norm_weight_D, eps)

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """See ``LayerOps``. Never measures."""
        if self.deterministic:
            return fixed_linear(x_TK, weight_NK, bias_N)
        choice = self.choices.settled(weight_NK, x_TK.shape[0])
        return linear(x_TK, weight_NK, bias_N, choice, self.choices.scratch)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See ``LayerOps``; two dimensions."""
        return rms_norm(x, weight, eps, residual)

    def gate_up_silu(
        self, x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See ``LayerOps``. Never measures."""
        if self.deterministic:
            return silu_mul(fixed_linear(x_TK, weight_NK, bias_N))
        choice = self.choices.settled(weight_NK, x_TK.shape[0], is_gate_up=True)
        return gate_up_silu(x_TK, weight_NK, bias_N, choice, self.choices.scratch)

    def written(self, slots_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``LayerOps``: the kernel itself skips slot -1."""
        return slots_T, None

    def turn_and_store(
        self,
        qkv_T: torch.Tensor,
        cos: torch.Tensor,
        signed_sin: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots_T: torch.Tensor,
        *,
        num_q: int,
        rows: torch.Tensor | None = None,
        positions_T: torch.Tensor | None = None,
        norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """See ``LayerOps``."""
        assert rows is None
        return turn_and_store(
            qkv_T,
            cos,
            signed_sin,
            k_cache,
            v_cache,
            slots_T,
            num_q=num_q,
            positions_T=positions_T,
            norm_weight=norm_weight,
            eps=eps,
            is_fixed=self.deterministic,
        )
