"""What a transformer's layers compute besides attention: what such operations must do, the torch ones, the choice.

Knows rows, weights and slots; knows no layers, no batches. The Triton ones (``ops_triton``) are imported only when
chosen.

Shapes: T rows of a pass, D model width, V ids, H query heads, G KV heads, W head width, N outputs and K inputs of a
linear map, I outputs of a gate.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.nn.functional as F

from pearl_ray.kernels.begin_pass import Begun, PassInput, begin_pass_reference

_PACK_FOR_ROWS = 8  # the batch size oneDNN lays the weights out for; measured flat from 4 to 16
_FIXED_ROWS = 8  # rows of every linear map of the deterministic torch operations
_ALIGNMENT = 64  # bytes; where BLAS libraries let the bits of a row depend on its address, rows that begin here agree


class LayerOps(Protocol):
    """The operations of one device and type.

    Attributes:
        name: 'torch' or 'triton'.
        reads_tables: :meth:`turn_and_store` wants tables of all positions, not the rows of this pass.
        deterministic: a row's result doesn't depend, to the last bit, on the other rows or on their number.
    """

    name: str
    reads_tables: bool
    deterministic: bool

    def lay_out(self, weight_NK: torch.Tensor) -> torch.Tensor:
        """The weight as :meth:`linear` wants it: itself, or a copy in another layout."""

    def settle(self, weights: Iterable[torch.Tensor], num_rows: int, gate_ups: Iterable[torch.Tensor] = ()) -> None:
        """Finds the fastest way of the linear maps of up to so many rows; before a CUDA graph is captured.

        ``gate_ups``: the weights for :meth:`gate_up_silu`; ``weights``: those for :meth:`linear`.
        """

    def settle_within(
        self,
        part: Callable[[int], Callable[[], object]],
        weights: Iterable[torch.Tensor],
        gate_ups: Iterable[torch.Tensor],
    ) -> None:
        """Decides between the ways that :meth:`settle` found about equally fast, by timing a part of the model's pass.

        ``part``: of a number of rows makes the function that launches it; ``weights``, ``gate_ups``: of the maps in it.
        """

    def begin_pass(
        self, given: PassInput, embedding_VD: torch.Tensor | None, norm_weight_D: torch.Tensor, eps: float
    ) -> Begun:
        """What the layers of a pass of fixed shape begin with; without an embedding no rows, no norm. Never waits."""

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ weight.T + bias``, ``[T, N]``, of a weight that :meth:`lay_out` returned."""

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``norm(x) * weight`` over the last dimension; with a residual: ``residual += x`` in place, then its norm.

        Computed in float32, for float64 in float64; the weight multiplies after the cast back, as Hugging Face does.
        """

    def gate_up_silu(
        self, x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``silu(gate) * up`` ``[T, I]`` of a :meth:`linear` map to gates and, behind them, ups: N is 2 I."""

    def written(self, slots_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``(slots, rows)`` for :meth:`turn_and_store`, made once for all layers of a pass."""

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
        """Returns the turned queries ``[T, H, W]``; turned keys, and values, go to their slots of the paged cache.

        Args:
            qkv_T: ``[T, (H + 2 G) W]``.
            cos, signed_sin: ``[T, 1, W]`` for the rows; or tables ``[L, W]`` of all positions, with ``positions_T``,
                which are clamped to them.
            k_cache, v_cache: ``[blocks, block_size, G, W]``.
            slots_T, rows: from :meth:`written`.
            norm_weight: ``[H + G, W]``, the weight of an RMSNorm of every query and key head before the turn.
        """


class TorchLayerOps:
    """The operations in plain torch: the CPU's, float32's and float64's, and the reference.

    On the CPU, float32 weights are laid out once for oneDNN: a handful of rows, a draft window's verification, then
    costs little more than one, where ``F.linear`` (MKL) takes twice as long from the second row on.
    """

    name = "torch"
    reads_tables = False

    def __init__(self, *, deterministic: bool = False) -> None:
        self.deterministic = deterministic

    def lay_out(self, weight_NK: torch.Tensor) -> torch.Tensor:
        """See ``LayerOps``: oneDNN's layout for float32 on the CPU."""
        if weight_NK.device.type != "cpu" or weight_NK.dtype != torch.float32 or not _can_pack():
            return weight_NK
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, _PACK_FOR_ROWS)
        return packed

    def settle(self, weights: Iterable[torch.Tensor], num_rows: int, gate_ups: Iterable[torch.Tensor] = ()) -> None:
        """See ``LayerOps``: nothing to choose from."""

    def settle_within(
        self,
        part: Callable[[int], Callable[[], object]],
        weights: Iterable[torch.Tensor],
        gate_ups: Iterable[torch.Tensor],
    ) -> None:
        """See ``LayerOps``."""

    def begin_pass(
        self, given: PassInput, embedding_VD: torch.Tensor | None, norm_weight_D: torch.Tensor, eps: float
    ) -> Begun:
        """See ``LayerOps``."""
        begun = begin_pass_reference(given, embedding_VD)
        if begun.embedded_TD is None:
            return begun
        return begun._replace(x_TD=self.rms_norm(begun.embedded_TD, norm_weight_D, eps))

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """See ``LayerOps``. Deterministic: always so many rows at once, the last ones filled up."""
        if not self.deterministic:
            return _linear(x_TK, weight_NK, bias_N)
        num_rows, width = x_TK.shape
        step = _ALIGNMENT // x_TK.element_size()
        shape = (-(-max(num_rows, 1) // _FIXED_ROWS) * _FIXED_ROWS, -(-width // step) * step)
        aligned = x_TK.new_zeros(shape)[:, :width]
        aligned[:num_rows] = x_TK
        parts = [_linear(part, weight_NK, bias_N) for part in torch.split(aligned, _FIXED_ROWS)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:num_rows]

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See ``LayerOps``; any number of dimensions."""
        if residual is not None:
            x = residual.add_(x)
        wide = x.to(torch.promote_types(weight.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(weight)

    def gate_up_silu(
        self, x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See ``LayerOps``."""
        gate_TI, up_TI = self.linear(x_TK, weight_NK, bias_N).chunk(2, dim=-1)
        return F.silu(gate_TI).mul_(up_TI)

    def written(self, slots_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``LayerOps``: the rows that are stored, None for all, and their slots. Waits for a GPU."""
        if not bool((slots_T < 0).any()):
            return slots_T.long(), None
        rows = (slots_T >= 0).nonzero()[:, 0]
        return slots_T[rows].long(), rows

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
        num_kv, width = k_cache.shape[2], k_cache.shape[3]
        heads = qkv_T.view(qkv_T.shape[0], num_q + 2 * num_kv, width)
        qk, v_TGW = heads[:, : num_q + num_kv], heads[:, num_q + num_kv :]
        if norm_weight is not None:
            qk = self.rms_norm(qk, norm_weight, eps)
        if positions_T is not None:
            positions_T = positions_T.clamp(0, cos.shape[0] - 1)
            cos, signed_sin = cos[positions_T][:, None], signed_sin[positions_T][:, None]
        qk = rotate(qk, cos, signed_sin)
        for new, cache in ((qk[:, num_q:], k_cache), (v_TGW, v_cache)):
            cache.flatten(0, 1).index_copy_(0, slots_T, new if rows is None else new[rows])
        return qk[:, :num_q]


def rotate(x_THW: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Turns every head by its row's angles: ``x * cos + rotate_half(x) * sin``, halves split as Hugging Face does."""
    half = x_THW.shape[-1] // 2
    swapped = torch.cat((x_THW[..., half:], x_THW[..., :half]), dim=-1)
    return (x_THW * cos).addcmul_(swapped, signed_sin)


def choose_layer_ops(device: torch.device | str, dtype: torch.dtype, *, deterministic: bool = False) -> LayerOps:
    """Triton's on CUDA for bfloat16 and float16 where Triton is installed, else torch's."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and dtype in (torch.bfloat16, torch.float16) and importlib.util.find_spec("triton") is not None:
        from pearl_ray.kernels.ops_triton import TritonLayerOps

        return TritonLayerOps(deterministic=deterministic)
    return TorchLayerOps(deterministic=deterministic)


def _linear(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    if weight_NK.is_mkldnn:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, bias_N, "none", [], "")
        return out
    return F.linear(x_TK, weight_NK, bias_N)


def _can_pack() -> bool:
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
