"""The Triton kernels on the CPU: a part of the GPU tests, under Triton's interpreter, in a process of its own.

The interpreter has to be chosen before Triton is first imported, which another test of this process may have done.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = (
    "test_kernels_race.py::test_the_noise_has_the_references_bits",
    "test_kernels_race.py::test_every_rows_token_and_score_are_the_references",
    "test_kernels_race.py::test_equal_scores_go_to_the_lowest_id_and_padding_never_wins",
    "test_kernels_race.py::test_shards_of_any_start_give_the_whole_vocabularys_answer",
    "test_kernels_race.py::test_verdicts_are_the_references_for_every_length_of_agreement",
    "test_kernels_attention.py::test_every_head_width_is_right_for_mixed_lengths[80-dtype0]",
    "test_kernels_attention.py::test_sequences_of_all_lengths_share_a_launch_with_any_number_of_parts",
    "test_kernels_attention.py::test_a_chunk_beside_many_short_sequences_is_cut_into_parts_and_they_are_not[60]",
    "test_kernels_attention.py::test_a_launch_has_room_for_every_unit_and_slot",
    "test_kernels_attention.py::test_a_tree_window_sees_the_prefix_and_its_ancestors_only",
    "test_kernels_layers.py::test_keys_and_values_land_in_their_slots_and_minus_one_writes_nothing",
    "test_kernels_layers.py::test_rms_norm_with_and_without_the_residual[576]",
    "test_kernels_layers.py::test_silu_times_up[6]",
    "test_kernels_layers.py::test_a_gate_up_map_with_silu_inside_is_right_for_odd_sizes[3]",
    "test_kernels_layers.py::test_a_gate_up_map_with_silu_inside_is_right_for_odd_sizes[33]",
    "test_kernels_layers.py::test_rows_behind_the_maps_are_left_alone",
    "test_kernels_layers.py::test_queries_and_keys_are_turned_and_stored[many-64-True-True]",
    "test_kernels_layers.py::test_queries_and_keys_are_turned_and_stored[few-80-True-True]",
    "test_kernels_rejection.py::test_what_the_cuts_keep_is_what_the_reference_keeps[tied]",
    "test_kernels_rejection.py::test_a_proposal_is_the_references_and_sums_to_one",
    "test_kernels_rejection.py::test_mixed_verdicts_are_the_references[0.3]",
)
FORWARD = (
    "test_kernels_layers.py::test_a_fixed_linear_map_gives_a_row_the_same_bits_among_any_others[37]",
    "test_kernels_layers.py::test_nothing_is_measured_in_a_forward",
    "test_kernels_layers.py::test_silu_goes_into_every_kernel_that_takes_pairs_and_isnt_split",
    "test_kernels_layers.py::test_gates_and_ups_go_the_way_that_was_chosen_for_them",
    "test_kernels_layers.py::test_the_fastest_way_is_taken_for_plain_maps_and_for_gates_and_ups_apart",
    "test_kernels_layers.py::test_what_is_fastest_within_a_pass_is_taken_however_it_did_by_itself",
    "test_kernels_begin.py::test_slots_behind_the_last_sequence_are_none",
    "test_kernels_begin.py::test_a_sequences_table_is_its_lanes_as_far_as_its_keys_reach_and_no_further",
    "test_kernels_begin.py::test_the_tables_of_real_sequences_are_the_references",
    "test_kernels_begin.py::test_rows_are_embedded_and_normed_with_the_bits_of_the_kernels_apart",
    "test_kernels_begin.py::test_a_pass_of_one_row_and_one_of_nothing_but_padding",
    "test_kernels_attention.py::test_a_fixed_plan_gives_a_row_the_same_bits_in_every_batch",
    "test_kernels_attention.py::test_a_fixed_plan_with_little_scratch_memory_goes_in_slices",
    "test_kernels_forward.py::test_the_fused_forward_is_as_close_to_float32_as_torch_in_the_same_type[qwen3]",
    "test_kernels_forward.py::test_a_pass_in_device_tensors_is_the_pass_of_lists[True]",
    "test_kernels_forward.py::test_a_forward_with_silu_inside_its_maps_is_the_one_with_silu_behind_them",
    "test_kernels_forward.py::test_tables_may_be_all_lanes_and_sequences_say_which[False]",
)


@pytest.mark.timeout(1500)  # minutes, where others are at work
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU")
@pytest.mark.parametrize("tests", [CHOSEN, FORWARD], ids=["kernels", "forward"])
def test_the_kernels_agree_with_their_references_under_the_interpreter(tests: tuple[str, ...]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    paths = [str(ROOT / "tests" / "gpu" / test) for test in tests]
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-o", "timeout=1200", "-m", "gpu"]
    command = [sys.executable, "-m", "pytest", *options, *paths]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout, done.stdout[-2000:]
