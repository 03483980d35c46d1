"""References for benchmarks that check: Hugging Face's model with our weights, and one-rank models to teach-force."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pearl_ray import env
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.rng import Purpose, gumbel
from pearl_ray.model.loading import Role, source_of
from pearl_ray.model.source import WeightSource


def hugging_face(role: Role, target_model: str | None, draft_model: str | None) -> LlamaForCausalLM:
    """The model of a (Llama) pair in Hugging Face's implementation, float32, with exactly the weights we load."""
    source = source_of(role, target_model, draft_model, str(env.cache_dir()))
    c = source.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": c.rope.rope_type, "rope_theta": c.rope.theta},
        tie_word_embeddings=c.tie_word_embeddings,
        max_position_embeddings=c.max_position_embeddings,
        bos_token_id=c.bos_token_id,
        eos_token_id=list(c.eos_token_ids),
        pad_token_id=c.eos_token_ids[0],
    )
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    model.load_state_dict(_weights(source), strict=False)
    return model


def _weights(source: WeightSource) -> dict[str, torch.Tensor]:
    weights = {name: source.load(name).to(torch.float32) for name in source.names()}
    if source.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


@torch.inference_mode()
def generate(model: LlamaForCausalLM, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Hugging Face's own greedy text."""
    ids = torch.tensor([list(prompt)])
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens)
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def teacher_forced(model: LlamaForCausalLM, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    """Logits ``[len(output), V]`` that decide each output token, float32."""
    ids = torch.tensor([[*prompt, *output]])
    return model(ids).logits[0, len(prompt) - 1 : -1].float()


def top_two_gap(logits_V: torch.Tensor, params: SamplingParams, position: int) -> float:
    """The distance of the two best scores logit + T·g at a position: below rounding, either token is right."""
    scores = logits_V
    if params.temperature > 0:
        noise = gumbel([params.seed or 0], [position], [0], Purpose.COUPLED, vocab_start=0, vocab_size=len(logits_V))
        scores = logits_V + params.temperature * noise[0]
    best = scores.topk(2).values
    return float(best[0] - best[1])
