"""The beginning of a pass in one launch, against torch: slots, block tables by lane, embeddings and their norm."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from pearl_ray.kernels.begin_pass import PassInput, begin_pass_reference
from pearl_ray.kernels.begin_pass_kernel import begin_pass
from pearl_ray.kernels.norm import rms_norm
from pearl_ray.kernels.ops import TorchLayerOps
from tests.kernel_checks import CAN_RUN, DEVICE, INTERPRETING, REASON, fresh, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CAN_RUN, reason=REASON)]

DTYPES = (torch.float16, *(() if INTERPRETING else (torch.bfloat16,)))  # whose products the interpreter gets wrong
BLOCK_SIZE, NUM_LANES, NUM_BLOCKS, NUM_IDS = 16, 9, 2060, 50
UNTOUCHED = 77
COUNTS, CONTEXTS = (3, 0, 1, 2, 1, 0), (40, 555, NUM_BLOCKS * BLOCK_SIZE, 17, 16, -3)  # two without rows


@pytest.fixture(autouse=True)
def _poison_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the wrapper allocates comes full of NaN, or of 77."""

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, math.nan if dtype.is_floating_point else UNTOUCHED, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", empty)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def some_pass(dtype: torch.dtype = torch.int32, num_padding: int = 4) -> PassInput:
    """Six sequences of seven rows, and padding full of rubbish; sequences without rows have no lane."""
    starts = [0]
    for count in COUNTS:
        starts.append(starts[-1] + count)
    ids = [5, 0, NUM_IDS - 1, 7, 7, 31, 2, *[10**6, -(10**6), NUM_IDS, 3][:num_padding]]
    tables = torch.randint(100, 10**6, (NUM_LANES, NUM_BLOCKS), dtype=torch.int32, device=DEVICE)
    return PassInput(
        ints(*ids, dtype=dtype),
        ints(33, -1, 9, 0, 15, 999, 4, *[3, 6, 12, -1][:num_padding], dtype=dtype),
        ints(*starts),
        ints(*CONTEXTS),
        tables,
        ints(8, 10**8, 0, 5, 3, -(10**8)),
        BLOCK_SIZE,
    )


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_slots_behind_the_last_sequence_are_none(kind: torch.dtype) -> None:
    given = some_pass(kind)
    begun = begin_pass(given, None, fresh(64, dtype=DTYPES[0]), 1e-6)
    assert begun.slots_T.dtype == kind and begun.slots_T.tolist() == [33, -1, 9, 0, 15, 999, 4, -1, -1, -1, -1]
    assert torch.equal(begun.slots_T, begin_pass_reference(given._replace(lanes_S=None), None).slots_T)
    assert begun.embedded_TD is None and begun.x_TD is None


def test_a_sequences_table_is_its_lanes_as_far_as_its_keys_reach_and_no_further() -> None:
    given = some_pass()
    tables = begin_pass(given, None, fresh(64, dtype=DTYPES[0]), 1e-6).tables_SB
    assert given.lanes_S is not None and tables.shape == (6, NUM_BLOCKS)
    for seq, (count, context) in enumerate(zip(COUNTS, CONTEXTS, strict=True)):
        used = -(-context // BLOCK_SIZE) if count else 0
        if used:
            assert torch.equal(tables[seq, :used], given.tables_LB[int(given.lanes_S[seq]), :used])
        assert (tables[seq, used:] == UNTOUCHED).all(), seq


def test_the_tables_of_real_sequences_are_the_references() -> None:
    given = some_pass()._replace(query_start_S1=ints(*range(7)), lanes_S=ints(8, 2, 0, 5, 3, 2))
    given = given._replace(context_lens_S=ints(*[NUM_BLOCKS * BLOCK_SIZE] * 6))
    tables = begin_pass(given, None, fresh(64, dtype=DTYPES[0]), 1e-6).tables_SB
    assert torch.equal(tables, begin_pass_reference(given, None).tables_SB)


def test_without_lanes_the_tables_are_the_ones_given() -> None:
    given = some_pass()._replace(lanes_S=None)
    assert begin_pass(given, None, fresh(64, dtype=DTYPES[0]), 1e-6).tables_SB is given.tables_LB


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [72, 576, 1000] if INTERPRETING else [64, 72, 576, 1000, 1024, 2048, 5120, 8192])
def test_rows_are_embedded_and_normed_with_the_bits_of_the_kernels_apart(width: int, dtype: torch.dtype) -> None:
    given, embedding, weight = some_pass(), fresh(NUM_IDS, width, dtype=dtype), fresh(width, dtype=dtype)
    begun = begin_pass(given, embedding, weight, 1e-5)
    expected = begin_pass_reference(given._replace(lanes_S=None), embedding)
    assert begun.embedded_TD is not None and expected.embedded_TD is not None and begun.x_TD is not None
    assert torch.equal(begun.embedded_TD, expected.embedded_TD)  # padding rows too: ids are clamped alike
    assert torch.equal(begun.x_TD, rms_norm(begun.embedded_TD, weight, 1e-5))
    wide = begun.embedded_TD.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.float()
    assert relative_error(begun.x_TD, wide) < 1e-2


def test_a_pass_of_one_row_and_one_of_nothing_but_padding() -> None:
    embedding, weight = fresh(NUM_IDS, 64, dtype=DTYPES[0]), fresh(64, dtype=DTYPES[0])
    one = PassInput(ints(3), ints(21), ints(0, 1), ints(22), some_pass().tables_LB, ints(4), BLOCK_SIZE)
    for given, slot in ((one, 21), (one._replace(query_start_S1=ints(0, 0), context_lens_S=ints(0)), -1)):
        begun = begin_pass(given, embedding, weight, 1e-5)
        assert begun.slots_T.tolist() == [slot] and begun.embedded_TD is not None and begun.x_TD is not None
        assert torch.equal(begun.embedded_TD[0], embedding[3])
        expected = TorchLayerOps().begin_pass(given, embedding, weight, 1e-5)
        assert expected.x_TD is not None and relative_error(begun.x_TD, expected.x_TD) < 1e-2


@pytest.mark.skipif(INTERPRETING, reason="graphs need a GPU")
def test_a_captured_beginning_is_replayed_with_other_contents() -> None:
    given, embedding, weight = some_pass(), fresh(NUM_IDS, 1024, dtype=DTYPES[-1]), fresh(1024, dtype=DTYPES[-1])
    begin_pass(given, embedding, weight, 1e-5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = begin_pass(given, embedding, weight, 1e-5)
    given.token_ids_T.copy_(given.token_ids_T.flip(0).clamp(0, 40))
    given.query_start_S1.copy_(ints(0, 1, 2, 4, 4, 6, 6))
    assert given.lanes_S is not None
    given.lanes_S.copy_(ints(1, 7, 2, 0, 6, 0))
    given.context_lens_S.copy_(ints(17, 16, 1, 0, 33, 0))
    graph.replay()
    eager = begin_pass(given, embedding, weight, 1e-5)
    assert out.embedded_TD is not None and eager.embedded_TD is not None and out.x_TD is not None
    assert torch.equal(out.slots_T, eager.slots_T) and torch.equal(out.embedded_TD, eager.embedded_TD)
    assert eager.x_TD is not None and torch.equal(out.x_TD, eager.x_TD)
    for seq, used in ((0, 2), (1, 1), (2, 1), (4, 3)):
        assert torch.equal(out.tables_SB[seq, :used], given.tables_LB[int(given.lanes_S[seq]), :used])
