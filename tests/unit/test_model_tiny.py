"""What the other tests rely on in the tiny pair: its acceptance, its text, its files, its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pearl_ray.core.comm import SingleGroup
from pearl_ray.kernels.backend import choose_attention
from pearl_ray.model.batching import Entry, make_batch
from pearl_ray.model.kv_cache import KVCache
from pearl_ray.model.sharding import ShardPlan
from pearl_ray.model.source import WeightSource, open_source
from pearl_ray.model.transformer import Transformer
from tests.tiny import ALPHABET, BOS_ID, EOS_ID, in_memory_source, make_reference_exact, tiny_tokenizer

BLOCK, PROMPT, NUM_NEW, NUM_SEQUENCES = 16, 12, 120, 16


class Model:
    def __init__(self, source: WeightSource) -> None:
        self.config = source.config
        plan, attention = ShardPlan.make(source.config, 1), choose_attention("auto", "cpu")
        self.transformer = Transformer(
            source.config,
            plan,
            0,
            source,
            dtype=torch.float64,
            device="cpu",
            group=SingleGroup(),
            attention=attention,
        )
        self.per_sequence = -(-(PROMPT + NUM_NEW) // BLOCK)
        config = source.config
        self.cache = KVCache(
            NUM_SEQUENCES * self.per_sequence,
            BLOCK,
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            torch.float64,
            "cpu",
        )

    def logits(self, sequences: list[list[int]], start: int, num_outputs: int) -> torch.Tensor:
        entries = [
            Entry(s[start:], start, range(i * self.per_sequence, (i + 1) * self.per_sequence), num_outputs)
            for i, s in enumerate(sequences)
        ]
        batch = make_batch(entries, BLOCK, torch.device("cpu"))
        logits = self.transformer.local_logits(self.transformer.forward(batch, self.cache))
        return logits.view(len(sequences), num_outputs, -1)

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        sequences, fed = [list(prompt) for prompt in prompts], 0
        for _ in range(NUM_NEW):
            chosen = self.logits(sequences, fed, 1)[:, 0].argmax(-1).tolist()
            fed = len(sequences[0])
            for sequence, token in zip(sequences, chosen, strict=True):
                sequence.append(token)
        return sequences


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_draft_agrees_about_seven_times_in_ten_on_text_that_does_not_repeat_itself(family: str) -> None:
    target, draft = Model(in_memory_source(family)), Model(in_memory_source(family, draft=True))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, 64, (NUM_SEQUENCES, PROMPT), generator=generator).tolist()
    texts = target.greedy(prompts)
    fed = [text[:-1] for text in texts]
    p, q = (model.logits(fed, 0, PROMPT + NUM_NEW - 1)[:, PROMPT - 1 :] for model in (target, draft))
    assert 0.6 < float((p.argmax(-1) == q.argmax(-1)).double().mean()) < 0.8
    log_p = p.log_softmax(-1)
    assert 1.5 < float(-(log_p.exp() * log_p).sum(-1).mean()) < 3.5, "entropy in nats, of at most 4.16"
    quadruples = [{tuple(text[i : i + 4]) for i in range(PROMPT, len(text) - 3)} for text in texts]
    assert sum(map(len, quadruples)) > 0.7 * NUM_SEQUENCES * (NUM_NEW - 3)


def test_the_directories_are_read_alike_by_our_loader_and_by_hugging_face(tiny_dirs: tuple[Path, Path]) -> None:
    tokens = [5, 9, 33, 2, 60, 11, 12, 13]
    for path, is_draft in zip(tiny_dirs, (False, True), strict=True):
        source = open_source(path)
        assert source.config == in_memory_source(draft=is_draft).config
        ours = Model(source).logits([tokens], 0, len(tokens))
        torch.testing.assert_close(ours, Model(in_memory_source(draft=is_draft)).logits([tokens], 0, 8), rtol=0, atol=0)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        assert theirs.dtype == torch.float64 and theirs.generation_config.eos_token_id == EOS_ID
        expected = make_reference_exact(theirs, source.config)(torch.tensor([tokens])).logits.detach()
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


def test_the_tokenizer_round_trips_its_alphabet_in_memory_and_from_files(tiny_dirs: tuple[Path, Path]) -> None:
    for tokenizer in (tiny_tokenizer(), AutoTokenizer.from_pretrained(tiny_dirs[0])):
        ids = tokenizer.encode(ALPHABET)
        assert ids == list(range(2, 64))
        assert tokenizer.decode(ids) == ALPHABET
        text = "What's in a name?\nThat which we call 1 rose: ok."
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id, len(tokenizer)) == (EOS_ID, BOS_ID, 64)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
        )
        assert chat == "user: hi\nassistant:"


def test_the_same_seed_makes_the_same_weights_and_another_seed_others() -> None:
    first, again, other = (in_memory_source(seed=seed).tensors for seed in (3, 3, 4))
    name = "model.layers.1.mlp.up_proj.weight"
    assert first[name].equal(again[name]) and not first[name].equal(other[name])
    assert in_memory_source(vocab_size=5).tensors["lm_head.weight"].shape == (5, 72)
