"""Write the embedded draft's asset from its bfloat16 weights, and measure what the precision costs.

    python benchmarks/draft_quantisation.py --target TARGET_DIR --draft DRAFT_FOLDER --data DATA_FOLDER --output FILE

TARGET_DIR is the target as a Hugging Face directory, DRAFT_FOLDER holds the draft's safetensors (without the
embedding), DATA_FOLDER humaneval.jsonl and gsm8k.jsonl. Greedy agreement is teacher-forced: the share of positions of
the target's own greedy answers at which the draft's likeliest token is the target's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from pearl_ray.model.config import ModelConfig
from pearl_ray.model.gguf_source import FROM_TARGET_KEY
from pearl_ray.model.source import open_source
from pearl_ray.model.tokenizer import Tokenizer, load_tokenizer

DATA_SETS = ("humaneval", "gsm8k")
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Answer:
    """One prompt and the target's greedy continuation of it, as token ids."""

    data_set: str
    prompt_ids: list[int]
    output_ids: list[int]


def load_draft(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files, by Hugging Face's names."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def write_asset(path: Path, tensors: Mapping[str, torch.Tensor], target: ModelConfig, kind: str) -> None:
    """Write a draft as GGUF in llama.cpp's layout, matrices as ``kind``, norms as F32, the embedding left out."""
    num_layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("smollm2-135m-draft6")
    writer.add_description(
        "6-layer draft distilled from SmolLM2-135M-Instruct; embedding and tokenizer are the target's"
    )
    writer.add_license("apache-2.0")
    writer.add_context_length(target.max_position_embeddings)
    writer.add_embedding_length(target.hidden_size)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(target.intermediate_size)
    writer.add_head_count(target.num_heads)
    writer.add_head_count_kv(target.num_kv_heads)
    writer.add_rope_dimension_count(target.head_dim)
    writer.add_rope_freq_base(target.rope.theta)
    writer.add_layer_norm_rms_eps(target.rms_norm_eps)
    writer.add_vocab_size(target.vocab_size)
    writer.add_bos_token_id(target.bos_token_id or 0)
    writer.add_eos_token_id(target.eos_token_ids[0])
    writer.add_array(FROM_TARGET_KEY, ["token_embd.weight"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, num_layers)
    for name, tensor in tensors.items():
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None, name
        values = tensor.float().numpy()
        for projection, num_heads in (("q_proj", target.num_heads), ("k_proj", target.num_kv_heads)):
            if f".{projection}." in name:
                values = _interleaved(values, num_heads)
        quantisation = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(stored, gguf.quantize(values, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's row order: each head's rotary pairs side by side."""
    return np.ascontiguousarray(rows.reshape(num_heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape))


def read_asset(path: Path, target_dir: Path) -> dict[str, torch.Tensor]:
    """The asset's tensors as the engine loads them, the target's embedding included."""
    source = open_source(path, fallback=open_source(target_dir))
    return {name: source.load(name) for name in source.names()}


def prompts(data: Path, tokenizer: Tokenizer, num_each: int) -> Iterator[tuple[str, list[int]]]:
    """The first turns of each set's first records, through the chat template."""
    for data_set in DATA_SETS:
        with (data / f"{data_set}.jsonl").open() as lines:
            for _, line in zip(range(num_each), lines, strict=False):
                messages = [{"role": "user", "content": json.loads(line)["turns"][0]}]
                yield data_set, tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)


@torch.inference_mode()
def greedy_answers(target_dir: Path, data: Path, num_each: int, num_tokens: int) -> list[Answer]:
    """The target's greedy answers in float32."""
    tokenizer = load_tokenizer(target_dir)
    model = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()
    answers = []
    for data_set, ids in prompts(data, tokenizer, num_each):
        inputs = torch.tensor([ids])
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, do_sample=False
        )
        answers.append(Answer(data_set, ids, output[0, len(ids) :].tolist()))
    return answers


@torch.inference_mode()
def agreement(tensors: Mapping[str, torch.Tensor], target_dir: Path, answers: list[Answer]) -> dict[str, float]:
    """Greedy agreement of a draft in float32 with the answers: per data set, and over all positions ('all')."""
    config = AutoConfig.from_pretrained(target_dir)
    config.num_hidden_layers = 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("model.layers."))
    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    hits: dict[str, list[bool]] = {name: [] for name in (*DATA_SETS, "all")}
    for answer in answers:
        logits = model(torch.tensor([answer.prompt_ids + answer.output_ids])).logits[0]
        proposed = logits[len(answer.prompt_ids) - 1 : -1].argmax(-1)
        same = (proposed == torch.tensor(answer.output_ids)).tolist()
        hits[answer.data_set] += same
        hits["all"] += same
    return {name: sum(found) / len(found) for name, found in hits.items() if found}


def main() -> None:
    """Write, read back, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kind", default="Q8_0", help="GGUF type of the matrices (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=6, help="of each data set (default: %(default)s)")
    parser.add_argument("--num-tokens", type=int, default=96, help="of each answer (default: %(default)s)")
    args = parser.parse_args()

    original = load_draft(args.draft)
    write_asset(args.output, original, open_source(args.target).config, args.kind)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    answers = greedy_answers(args.target, args.data, args.num_prompts, args.num_tokens)
    original[EMBEDDING] = open_source(args.target).load(EMBEDDING)
    print(f"{len(answers)} prompts, {sum(len(a.output_ids) for a in answers)} positions")
    shipped = read_asset(args.output, args.target)
    for label, tensors in (("bfloat16", original), (args.kind, shipped)):
        figures = agreement(tensors, args.target, answers)
        print(f"{label:>10}: " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
