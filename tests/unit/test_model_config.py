"""Reading config.json: both transformers versions, defaults, and what is refused."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from pearl_ray.core.errors import ModelLoadError, UnsupportedModelError
from pearl_ray.model.config import RopeConfig, from_hf_config
from tests.tiny import hf_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_old_and_new_spelling_of_rope_and_dtype_mean_the_same() -> None:
    scaling = {**LLAMA3, "original_max_position_embeddings": 64}
    old = hf_config(rope_theta=5e5, rope_scaling=scaling, torch_dtype="bfloat16")
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"rope_parameters": {**scaling, "rope_theta": 5e5}, "dtype": "bfloat16"}
    assert from_hf_config(old) == from_hf_config(new)
    assert from_hf_config(old).rope.theta == 5e5
    assert from_hf_config(old).rope.original_max_position_embeddings == 64
    assert from_hf_config(old).dtype == "bfloat16"


def test_the_oldest_spelling_of_the_rope_type_is_read() -> None:
    config = from_hf_config(hf_config(rope_scaling={"type": "linear", "factor": 2.0}))
    assert config.rope == RopeConfig(rope_type="linear", theta=10000.0, factor=2.0)


def test_llama3_without_an_original_length_takes_the_models_own() -> None:
    assert from_hf_config(hf_config(rope_scaling=LLAMA3)).rope.original_max_position_embeddings == 32768


@pytest.mark.parametrize("cls", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_what_transformers_itself_writes_is_read(cls: type) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 100}
    made = cls(**sizes, num_hidden_layers=3, vocab_size=77, rms_norm_eps=1e-5, tie_word_embeddings=True)
    written = {**made.to_diff_dict(), "architectures": [f"{cls.__name__.removesuffix('Config')}ForCausalLM"]}
    config = from_hf_config(written)
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.num_layers) == (64, 8, 2, 3)
    assert config.head_dim == (made.head_dim if cls is not Qwen2Config else 8)
    assert config.rms_norm_eps == 1e-5 and config.tie_word_embeddings and config.vocab_size == 77
    assert config.rope == RopeConfig(theta=made.rope_parameters["rope_theta"])
    assert config.max_position_embeddings == made.max_position_embeddings
    assert config.bos_token_id == made.bos_token_id


def test_families_differ_by_their_switches() -> None:
    llama, qwen2, qwen3 = (from_hf_config(hf_config(family)) for family in ("llama", "qwen2", "qwen3"))
    assert not (llama.qkv_bias or llama.output_bias or llama.mlp_bias or llama.qk_norm)
    assert qwen2.qkv_bias and not qwen2.output_bias and not qwen2.qk_norm
    assert qwen3.qk_norm and not qwen3.qkv_bias
    biased = from_hf_config(hf_config("llama", attention_bias=True, mlp_bias=True))
    assert biased.qkv_bias and biased.output_bias and biased.mlp_bias


def test_the_model_type_serves_where_architectures_is_missing() -> None:
    config = {key: value for key, value in hf_config("qwen3").items() if key != "architectures"}
    assert from_hf_config(config).architecture == "Qwen3ForCausalLM"


def test_one_or_several_end_tokens_are_read() -> None:
    assert from_hf_config(hf_config(eos_token_id=[3, 5])).eos_token_ids == (3, 5)
    assert from_hf_config(hf_config(eos_token_id=3)).eos_token_ids == (3,)
    assert from_hf_config(hf_config(eos_token_id=None)).eos_token_ids == ()


def test_a_sliding_window_that_is_switched_off_is_accepted() -> None:
    from_hf_config(hf_config("qwen2", use_sliding_window=False, sliding_window=4096))
    from_hf_config(hf_config("qwen2", use_sliding_window=True, sliding_window=4096, max_window_layers=2))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM.*Qwen3ForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu.*silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn.*llama3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn.*bfloat16"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(override: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        from_hf_config(hf_config(**override))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 2}, "num_kv_heads=2"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"eos_token_id": "x"}, "eos_token_id"),
    ],
)
def test_a_size_that_makes_no_sense_is_refused_by_name(override: dict[str, object], named: str) -> None:
    with pytest.raises(ModelLoadError, match=named):
        from_hf_config(hf_config(**override))
