"""Cache blocks: nobody's block is taken twice, only what is committed and written is found, the oldest goes first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pearl_ray.core.blocks import BlockPool, Holding
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Node, SequenceState
from pearl_ray.core.requests import make_request
from pearl_ray.core.residents import Residents

TOKENS = list(range(40))


def pool(num_blocks: int = 8) -> BlockPool:
    return BlockPool(num_blocks, 4, prefix_caching=True)


def residents(target: BlockPool, draft: BlockPool | None) -> tuple[Residents, object]:
    made = Residents(target, draft)
    request = make_request(
        "r",
        None,
        TOKENS[:9],
        SamplingParams(max_tokens=20),
        seed=0,
        rejection=False,
        eos_token_ids=frozenset(),
        max_total=29,
        decode=str,
        now=0.0,
    )
    return made, request.answers[0]


@pytest.mark.parametrize(
    ("state", "target_found", "draft_found"),
    [
        # C = 9: the block of positions 4 … 7 lies below C − 1 = 8; both caches have written it
        (SequenceState(6, 9, 40, 4, target_kv=8, draft_kv=8), 8, 8),
        # C = 8: the newest committed token, at 7, has no KV in the target yet, so the second block isn't whole
        (SequenceState(6, 8, 40, 4, target_kv=7, draft_kv=7), 4, 4),
        # pending tokens are in the draft's cache beyond C − 1, and in the target's after the forward: never findable
        (SequenceState(6, 8, 40, 4, (Node(1), Node(2)), target_kv=7, draft_kv=9), 4, 4),
        # a draft that is behind keeps only what it has written
        (SequenceState(6, 13, 40, 4, target_kv=12, draft_kv=5), 12, 4),
    ],
)
def test_only_committed_and_written_blocks_are_found(state, target_found, draft_found):
    pools = pool(), pool()
    members, answer = residents(*pools)
    members.join(answer, 4)
    running = members.running[0]
    running.target.extend(running.target.missing(16))
    running.keep_committed(TOKENS[: state.num_committed], state)
    assert len(pools[0].find_prefix(TOKENS, 40)) * 4 == target_found
    assert len(pools[1].find_prefix(TOKENS, 40)) * 4 == draft_found


def test_a_cached_prefix_is_shared_and_survives_its_first_holder():
    blocks = pool()
    first = Holding(blocks)
    first.extend(3)
    first.keep_committed(TOKENS, 12)
    second = Holding(blocks)
    assert second.start_from(blocks.find_prefix(TOKENS, 11), TOKENS) == 8
    assert second.blocks == first.blocks[:2]
    first.release()
    assert blocks.num_free == 6
    second.release()
    assert blocks.num_free == 8 and len(blocks.find_prefix(TOKENS, 12)) == 3


def test_what_was_unused_longest_is_forgotten_first():
    blocks = pool(4)
    old, new = Holding(blocks), Holding(blocks)
    old.extend(1)
    old.keep_committed([1, 2, 3, 4], 4)
    new.extend(1)
    new.keep_committed([5, 6, 7, 8], 4)
    old.release()
    new.release()
    Holding(blocks).extend(3)  # two were never used, the third is the oldest one's
    assert not blocks.find_prefix([1, 2, 3, 4], 4) and blocks.find_prefix([5, 6, 7, 8], 4)


def test_a_block_released_twice_is_noticed():
    blocks = pool()
    taken = blocks.allocate(1)
    blocks.release(taken)
    with pytest.raises(AssertionError, match="released twice"):
        blocks.release(taken)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_block_is_free_or_held_and_never_both(data):
    blocks = pool(10)
    held: list[Holding] = []
    texts = [TOKENS[:20], [9, *TOKENS[1:20]], TOKENS[:8] + [7] * 12]
    for _ in range(data.draw(st.integers(1, 30))):
        if held and data.draw(st.booleans()):
            held.pop(data.draw(st.integers(0, len(held) - 1))).release()
        else:
            text, size = data.draw(st.sampled_from(texts)), data.draw(st.integers(1, 20))
            holding = Holding(blocks)
            cached = blocks.find_prefix(text, size - 1)
            if holding.missing(size) - len(cached) + blocks.num_free_among(cached) > blocks.num_free:
                continue
            holding.start_from(cached, text)
            holding.extend(holding.missing(size))
            holding.keep_committed(text, size)
            held.append(holding)
        counts: dict[int, int] = {}
        for holding in held:
            assert len(set(holding.blocks)) == len(holding.blocks)
            for block in holding.blocks:
                counts[block] = counts.get(block, 0) + 1
        assert blocks.num_free == 10 - len(counts)
        # whoever shares a block holds the same text there
        for one in held:
            for other in held:
                shared = set(one.blocks) & set(other.blocks)
                assert all(one.blocks.index(b) == other.blocks.index(b) for b in shared)
