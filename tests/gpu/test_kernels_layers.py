"""KV store, norm, rotary, activation and the small linear maps against float32, with poisoned outputs and odd sizes."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from pearl_ray.kernels import linear as linear_kernels
from pearl_ray.kernels import linear_choice
from pearl_ray.kernels.activation import silu_mul, silu_mul_reference
from pearl_ray.kernels.kv_store import store_kv, store_kv_reference
from pearl_ray.kernels.linear import DOTS, PRODUCTS, TORCH, Choice, fixed_linear, gate_up_silu, linear
from pearl_ray.kernels.linear_choice import LinearChoices
from pearl_ray.kernels.norm import rms_norm, rms_norm_reference
from pearl_ray.kernels.ops import TorchLayerOps
from pearl_ray.kernels.ops_triton import TritonLayerOps
from pearl_ray.kernels.rotary import turn_and_store, turn_and_store_reference
from tests.kernel_checks import (
    CAN_RUN,
    DEVICE,
    INTERPRETING,
    REASON,
    fresh,
    poisoned,
    relative_error,
    sum_products_by_row,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CAN_RUN, reason=REASON)]

DTYPE = torch.float16 if INTERPRETING else torch.bfloat16
LIMIT = 2e-3 if INTERPRETING else 1e-2


@pytest.fixture(autouse=True)
def _poison_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the wrappers allocate comes full of NaN."""

    def empty(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        shape = (shape,) if isinstance(shape, int) else shape
        return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", empty)


def same_where_written(out: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(out.nan_to_num(7e3), expected.nan_to_num(7e3))


@pytest.mark.parametrize(("num_kv", "width"), [(1, 64), (3, 80), (8, 128)])
def test_keys_and_values_land_in_their_slots_and_minus_one_writes_nothing(num_kv: int, width: int) -> None:
    joint = fresh(11, 5 * num_kv, width, dtype=DTYPE)
    k, v = joint[:, :num_kv], joint[:, num_kv : 2 * num_kv]
    slots = torch.randperm(7 * 16, device=DEVICE)[:11]
    slots[3] = slots[10] = -1
    caches = poisoned((4, 7, 16, num_kv, width), DTYPE)
    store_kv(k, v, caches[0], caches[1], slots)
    store_kv_reference(k, v, caches[2], caches[3], slots)
    assert same_where_written(caches[:2], caches[2:])
    assert int((~caches[0].isnan()).sum()) == 9 * num_kv * width


@pytest.mark.parametrize("width", [64, 576, 1000] if INTERPRETING else [64, 576, 1000, 5120, 8192])
def test_rms_norm_with_and_without_the_residual(width: int) -> None:
    x, weight = fresh(5, width, dtype=DTYPE), fresh(width, dtype=DTYPE)
    assert relative_error(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5)) < LIMIT
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5) * weight.float()
    assert relative_error(rms_norm(x, weight, 1e-5), wide) < LIMIT
    residual = fresh(5, width, dtype=DTYPE, scale=3.0)
    expected_residual = residual.clone()
    expected = rms_norm_reference(x, weight, 1e-5, expected_residual)
    assert relative_error(rms_norm(x, weight, 1e-5, residual), expected) < LIMIT
    assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("width", [6, 1536, 2050])
def test_silu_times_up(width: int) -> None:
    joint = fresh(7, 2 * width, dtype=DTYPE, scale=4.0)
    assert relative_error(silu_mul(joint), silu_mul_reference(joint)) < LIMIT


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize(("num_tokens", "num_q", "num_kv"), [(6, 6, 2), (21, 8, 4)], ids=["few", "many"])
def test_queries_and_keys_are_turned_and_stored(
    num_tokens: int, num_q: int, num_kv: int, width: int, by_position: bool, has_norm: bool
) -> None:
    qkv = fresh(num_tokens, (num_q + 2 * num_kv) * width, dtype=DTYPE)
    positions = torch.randint(0, 50, (num_tokens,), device=DEVICE)
    angles = torch.arange(50, device=DEVICE)[:, None] * (0.3 ** torch.arange(width // 2, device=DEVICE))
    cos, sin = torch.cat((angles.cos(),) * 2, -1).to(DTYPE), torch.cat((-angles.sin(), angles.sin()), -1).to(DTYPE)
    if by_position:
        positions[3], positions[4] = 10**6, -7  # as padding rows have it: clamped
    keywords = {"num_q": num_q, "norm_weight": fresh(num_q + num_kv, width, dtype=DTYPE) if has_norm else None}
    keywords |= {"eps": 1e-6, "positions_T": positions if by_position else None}
    if not by_position:
        cos, sin = cos[positions][:, None], sin[positions][:, None]
    slots = torch.randperm(5 * 16, device=DEVICE)[:num_tokens]
    slots[2] = -1
    caches = poisoned((4, 5, 16, num_kv, width), DTYPE)
    q = turn_and_store(qkv, cos, sin, caches[0], caches[1], slots, **keywords)
    expected = turn_and_store_reference(qkv, cos, sin, caches[2], caches[3], slots, **keywords)
    assert relative_error(q, expected) < LIMIT
    assert torch.equal(caches[0].isnan(), caches[2].isnan())
    assert relative_error(caches[0].nan_to_num(), caches[2].nan_to_num()) < LIMIT
    assert same_where_written(caches[1], caches[3])


def test_a_fixed_turn_gives_a_token_the_same_bits_among_any_others() -> None:
    num_tokens, num_q, num_kv, width = 40, 8, 4, 80
    qkv = fresh(num_tokens, (num_q + 2 * num_kv) * width, dtype=DTYPE)
    cos, sin = fresh(num_tokens, 1, width, dtype=DTYPE), fresh(num_tokens, 1, width, dtype=DTYPE)
    slots = torch.randperm(5 * 16, device=DEVICE)[:num_tokens]
    cache = poisoned((2, 5, 16, num_kv, width), DTYPE)
    options = {"num_q": num_q, "norm_weight": fresh(num_q + num_kv, width, dtype=DTYPE), "eps": 1e-6, "is_fixed": True}
    whole = turn_and_store(qkv, cos, sin, cache[0], cache[1], slots, **options)
    keys = cache[0].flatten(0, 1)[slots]
    for some in (slice(0, 1), slice(7, 10), slice(20, 40)):
        q = turn_and_store(qkv[some], cos[some], sin[some], cache[0], cache[1], slots[some], **options)
        assert torch.equal(q, whole[some]) and torch.equal(cache[0].flatten(0, 1)[slots[some]], keys[some])


@pytest.mark.parametrize("choice", [*PRODUCTS, *DOTS], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 13, 33])
def test_a_small_linear_map_is_right_for_odd_sizes(rows: int, choice: Choice) -> None:
    if choice not in linear_kernels.candidates(rows):
        pytest.skip("not for so many rows")
    for outputs, inputs, has_bias in ((129, 1024, False), (67, 600, True)):
        x, weight = fresh(rows, inputs, dtype=DTYPE), fresh(outputs, inputs, dtype=DTYPE, scale=inputs**-0.5)
        bias = fresh(outputs, dtype=DTYPE) if has_bias else None
        expected = x.float() @ weight.float().T + (bias.float() if bias is not None else 0.0)
        assert relative_error(linear(x, weight, bias, choice), expected) < LIMIT


@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("rows", [1, 13, 33])
def test_a_map_whose_inputs_are_split_is_right_and_the_same_each_time(rows: int, splits: int) -> None:
    scratch = linear_kernels.Scratch(DEVICE)
    scratch.partial.fill_(math.nan)
    for choice in (dataclasses.replace(way, splits=splits) for way in DOTS[3:]):
        for outputs, inputs, has_bias in ((129, 1024, False), (67, 600, True)):
            x, weight = fresh(rows, inputs, dtype=DTYPE), fresh(outputs, inputs, dtype=DTYPE, scale=inputs**-0.5)
            bias = fresh(outputs, dtype=DTYPE) if has_bias else None
            expected = x.float() @ weight.float().T + (bias.float() if bias is not None else 0.0)
            out = linear(x, weight, bias, choice, scratch)
            assert relative_error(out, expected) < LIMIT
            for _ in range(1 if INTERPRETING else 20):  # parts end in any order
                assert torch.equal(linear(x, weight, bias, choice, scratch), out)
            assert not scratch.counters.any()


FUSED = tuple(dataclasses.replace(way, has_silu=True) for way in (*PRODUCTS[:3], *DOTS))


@pytest.mark.parametrize("rows", [1, 3, 4, 13, 33, 64])
def test_a_gate_up_map_with_silu_inside_is_right_for_odd_sizes(rows: int) -> None:
    for choice in (way for way in linear_kernels.candidates(rows, is_gate_up=True) if way.has_silu):
        can_bfloat16 = (
            not INTERPRETING or choice.kind == "products"
        )  # the interpreter's matrix products of it are wrong
        for dtype, limit in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2))[: 2 if can_bfloat16 else 1]:
            for width, inputs, has_bias in ((21 if INTERPRETING else 65, 1024, False), (35, 600, True)):
                x = fresh(rows, inputs, dtype=dtype)
                weight = fresh(2 * width, inputs, dtype=dtype, scale=2 * inputs**-0.5)
                bias = fresh(2 * width, dtype=dtype) if has_bias else None
                gate, up = (x.float() @ weight.float().T + (bias.float() if bias is not None else 0.0)).chunk(2, -1)
                out = gate_up_silu(x, weight, bias, choice)
                expected = torch.nn.functional.silu(gate) * up
                assert out.shape == (rows, width) and relative_error(out, expected) < limit, (choice, dtype)


@pytest.mark.parametrize("choice", [FUSED[1], FUSED[4]], ids=str)
def test_rows_behind_the_maps_are_left_alone(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = poisoned((16, 35), DTYPE)
    x, weight = fresh(3, 600, dtype=DTYPE), fresh(70, 600, dtype=DTYPE, scale=600**-0.5)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: whole[: shape[0]])
    out = gate_up_silu(x, weight, None, choice)
    assert out.data_ptr() == whole.data_ptr()
    assert not whole[:3].isnan().any() and whole[3:].isnan().all()


def test_silu_goes_into_every_kernel_that_takes_pairs_and_isnt_split() -> None:
    for rows, sizes in ((1, (51_200, 5120)), (8, (5120, 25_600)), (64, (6144, 1024))):
        plain = linear_kernels.candidates(rows, *sizes)
        ways = linear_kernels.candidates(rows, *sizes, is_gate_up=True)
        assert not any(way.has_silu for way in plain) and ways[: len(plain)] == plain
        assert {dataclasses.replace(way, has_silu=False) for way in ways[len(plain) :]} == {
            way for way in plain if way != TORCH and way.splits == 1 and way.block_n > 1
        }
    assert linear_kernels.candidates(65, is_gate_up=True) == (TORCH,)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gates_and_ups_go_the_way_that_was_chosen_for_them(deterministic: bool) -> None:
    ops = TritonLayerOps(deterministic=deterministic)
    x, weight, bias = fresh(3, 96, dtype=DTYPE), fresh(70, 96, dtype=DTYPE, scale=0.1), fresh(70, dtype=DTYPE)
    expected = TorchLayerOps().gate_up_silu(x.float(), weight.float(), bias.float())
    assert relative_error(ops.gate_up_silu(x, weight, bias), expected) < LIMIT  # nothing was settled
    for choice in (TORCH, PRODUCTS[0], FUSED[0], FUSED[3]):
        ops.choices.chosen[70, 96, DTYPE, True, 4] = choice
        assert relative_error(ops.gate_up_silu(x, weight, bias), expected) < LIMIT
        assert ops.linear(x, weight, bias).shape == (3, 70)  # a plain map of that shape is another one


def test_split_ways_are_for_maps_of_few_outputs_and_long_parts() -> None:
    assert all(c.splits == 1 for c in (*linear_kernels.candidates(8), *linear_kernels.candidates(8, 51_200, 5120)))
    split = [c for c in linear_kernels.candidates(8, 5120, 25_600) if c.splits > 1]
    assert split and all(-(-5120 // c.block_n) * c.splits <= 330 and c.kind == "dots" for c in split)
    assert all(c.splits == 1 for c in linear_kernels.candidates(8, 1024, 256))


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_a_fixed_linear_map_gives_a_row_the_same_bits_among_any_others(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if INTERPRETING:
        sum_products_by_row(monkeypatch)
    for outputs, inputs, has_bias in ((129, 1024, False), (67, 600, True)):
        x, weight = fresh(rows, inputs, dtype=DTYPE), fresh(outputs, inputs, dtype=DTYPE, scale=inputs**-0.5)
        bias = fresh(outputs, dtype=DTYPE) if has_bias else None
        out = fixed_linear(x, weight, bias)
        expected = x.float() @ weight.float().T + (bias.float() if bias is not None else 0.0)
        assert relative_error(out, expected) < LIMIT
        for row in {0, rows // 2, rows - 1}:
            assert torch.equal(fixed_linear(x[row : row + 1], weight, bias)[0], out[row])
            among = torch.cat((fresh(3, inputs, dtype=DTYPE), x[row : row + 1], fresh(4, inputs, dtype=DTYPE)))
            assert torch.equal(fixed_linear(among, weight, bias)[3], out[row])


def test_nothing_is_measured_in_a_forward() -> None:
    choices, weight = LinearChoices(), fresh(64, 64, dtype=DTYPE)
    assert choices.settled(weight, 3) == linear_kernels.TORCH and not choices.chosen
    choices.chosen[64, 64, DTYPE, False, 4] = PRODUCTS[0]
    choices.chosen[64, 64, DTYPE, True, 8] = PRODUCTS[1]
    assert choices.settled(weight, 3) == choices.settled(weight, 4) == PRODUCTS[0]
    assert (
        choices.settled(weight, 0) == choices.settled(weight, 5) == choices.settled(weight, 65) == linear_kernels.TORCH
    )
    assert choices.settled(weight, 7, is_gate_up=True) == PRODUCTS[1]
    assert choices.settled(weight, 3, is_gate_up=True) == TORCH


def test_more_rows_than_the_kernels_take_go_to_the_library() -> None:
    assert linear_kernels.candidates(65) == (linear_kernels.TORCH,)
    choices = LinearChoices()
    choices.chosen[8, 8, DTYPE, False, 64] = PRODUCTS[0]
    assert choices.settled(fresh(8, 8, dtype=DTYPE), 65) == linear_kernels.TORCH


@pytest.mark.skipif(INTERPRETING, reason="times kernels")
def test_a_way_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear_choice.linear

    def wrong(*arguments: object) -> torch.Tensor:
        return right(*arguments) * (1.0 if arguments[3] == linear_kernels.TORCH else 1.05)

    monkeypatch.setattr(linear_choice, "linear", wrong)
    choices = LinearChoices()
    choices.settle([fresh(1024, 1024, dtype=DTYPE)], 1)
    assert set(choices.chosen.values()) == {linear_kernels.TORCH}


@pytest.mark.skipif(INTERPRETING, reason="times kernels")
def test_a_fused_way_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear_choice.gate_up_silu

    def wrong(*arguments: object) -> torch.Tensor:
        out = right(*arguments)
        return out.flip(1) if arguments[3].has_silu else out

    monkeypatch.setattr(linear_choice, "gate_up_silu", wrong)
    choices = LinearChoices()
    choices.settle([], 8, [fresh(2048, 1024, dtype=DTYPE)])
    assert len(choices.chosen) == 4 and not any(choice.has_silu for choice in choices.chosen.values())


@pytest.mark.skipif(INTERPRETING, reason="times kernels")
def test_a_map_to_gates_and_ups_is_timed_with_its_silu_in_every_way() -> None:
    weights = [fresh(2048, 1024, dtype=DTYPE, scale=0.03) for _ in range(2)]
    scratch = linear_kernels.Scratch(DEVICE)
    for rows in (1, 8, 64):
        for way in linear_kernels.candidates(rows, 2048, 1024, is_gate_up=True):
            assert 0 < linear_choice.milliseconds(weights, rows, way, scratch, is_gate_up=True) < 10, way


def test_the_fastest_way_is_taken_for_plain_maps_and_for_gates_and_ups_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def measure(weights: list[object], rows: int, choice: Choice, scratch: object, *, is_gate_up: bool) -> float:
        timed.append((len(weights), rows, choice, is_gate_up))
        return {PRODUCTS[0]: 2.0, FUSED[0]: 1.0, TORCH: 3.0}.get(choice, math.inf)

    monkeypatch.setattr(linear_choice, "milliseconds", measure)
    weight = SimpleNamespace(shape=torch.Size((70, 96)), dtype=DTYPE, device=torch.device("cuda"))
    choices = LinearChoices(scratch=linear_kernels.Scratch(DEVICE))
    choices.settle([weight, weight], 8, [weight])  # type: ignore[list-item]
    assert {count for count, _, _, is_gate_up in timed if is_gate_up} == {1}
    assert {count for count, _, choice, is_gate_up in timed if not is_gate_up} == {2}
    assert not any(choice.has_silu for _, _, choice, is_gate_up in timed if not is_gate_up)
    plain, paired = (
        [choices.settled(weight, rows, is_gate_up=is_gate_up) for rows in (1, 3, 8)]  # type: ignore[arg-type]
        for is_gate_up in (False, True)
    )
    assert plain == [PRODUCTS[0], PRODUCTS[0], TORCH] and paired == [FUSED[0], FUSED[0], TORCH]


def test_what_is_fastest_within_a_pass_is_taken_however_it_did_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps are looked at one by one, with the others as they were chosen before."""
    device = torch.device("cuda")
    shapes = {"small": (70, 96), "large": (80, 96), "outside": (90, 96)}
    weights = {
        name: SimpleNamespace(shape=torch.Size(shape), dtype=DTYPE, device=device, nbytes=math.prod(shape))
        for name, shape in shapes.items()
    }
    costs = {TORCH: 3.0, PRODUCTS[0]: 1.0, PRODUCTS[1]: 2.0}
    monkeypatch.setattr(
        linear_choice, "milliseconds", lambda weights, rows, choice, *_, **__: costs.get(choice, math.inf)
    )
    choices, seen = LinearChoices(scratch=linear_kernels.Scratch(DEVICE)), []

    class Timed:
        def __init__(self, function: object, device: object) -> None:
            function()  # type: ignore[operator]
            self.ways = seen[-1]

        def seconds(self, runs: int) -> list[float]:
            large, small = self.ways  # beside the large map's second way the small one's last is fastest
            return [{PRODUCTS[1]: 1.0}.get(large, 2.0) + {TORCH: 0.1}.get(small, 0.2)] * runs

    monkeypatch.setattr(linear_choice, "Timed", Timed)

    def part(rows: int) -> object:
        return lambda: seen.append(tuple(choices.settled(weights[name], rows) for name in ("large", "small")))

    choices.settle(list(weights.values()), 2)  # type: ignore[arg-type]
    choices.settle_within(part, [weights["small"], weights["large"]])  # type: ignore[arg-type, list-item]
    for rows in (1, 2):
        chosen = {name: choices.settled(weight, rows) for name, weight in weights.items()}  # type: ignore[arg-type]
        assert chosen == {"large": PRODUCTS[1], "small": TORCH, "outside": PRODUCTS[0]}
    assert len(seen) == 2 * 2 * 3
    choices.settle_within(part, [weights["small"]])  # type: ignore[arg-type, list-item]
    assert len(seen) == 2 * 2 * 3  # settled once


@pytest.mark.skipif(INTERPRETING, reason="times kernels")
def test_settling_measures_each_shape_for_every_number_of_rows_up_to_the_one_asked_for() -> None:
    choices, weight = LinearChoices(), fresh(256, 512, dtype=DTYPE)
    choices.settle([weight, weight.clone()], 6)
    assert sorted(key[-1] for key in choices.chosen) == [1, 2, 4, 8]
    before = dict(choices.chosen)
    choices.settle([weight, fresh(1024, 512, dtype=DTYPE)], 500)
    assert sorted(key[-1] for key in choices.chosen if key[0] == 256) == [1, 2, 4, 8, 16, 32, 64]
    assert sorted(key[-1] for key in choices.chosen if key[0] == 1024) == [1, 2, 4, 8, 16, 32, 64]
    assert all(choices.chosen[key] == choice for key, choice in before.items())
    assert choices.settled(weight, 5) is choices.chosen[256, 512, DTYPE, False, 8]
    assert choices.settled(weight, 5) in linear_kernels.candidates(8)
