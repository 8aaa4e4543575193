"""The state at each word's position encodes the word, and the contrastive features do not change."""

from pathlib import Path

import pytest
import torch

from localctl.micro.shapes import SHAPES
from research.micro_base.clip import new_clip, new_tokenizer, token_ids
from research.micro_base.loop import LoopConfig
from research.micro_base.words import train_words, with_words, word_directions


def test_directions_of_words_are_orthogonal() -> None:
    words = torch.tensor([3, 7, 30])
    directions = word_directions(40, words, 16)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(40), atol=1e-6)
    assert torch.allclose(directions[words] @ directions[words].T, torch.eye(3), atol=1e-6)
    assert torch.equal(directions, word_directions(40, words, 16))
    assert word_directions(40, torch.arange(40), 16).shape == (40, 16)  # more than can be


def test_a_word_is_mixed_in_and_the_ends_stay() -> None:
    states = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 2, 3, 1], [0, 4, 1, 1]])
    directions = word_directions(5, torch.tensor([2, 3, 4]), 8)
    mixed = with_words(states, ids, directions, (0, 1), 0.5)
    assert torch.allclose(mixed.norm(dim=-1), states.norm(dim=-1), atol=1e-5)
    special = (ids == 0) | (ids == 1)
    assert torch.equal(mixed[special], states[special])
    assert torch.allclose(with_words(states, ids, directions, (0, 1), 0.0), states, atol=1e-5)
    alone = with_words(states, ids, directions, (0, 1), 1.0)[~special]
    assert torch.allclose(alone / alone.norm(dim=-1, keepdim=True), directions[ids[~special]], atol=1e-5)


def variance_of_words(tower, tokenizer) -> tuple[float, float]:
    """Return the shares of variance, of the states at the shape's word, that the shape and the colour explain."""
    states = []
    for color in ("red", "blue", "pink"):
        ids = token_ids(tokenizer, [f"a {color} {shape} on a black background" for shape in SHAPES], 12)
        states.append(tower(ids).last_hidden_state[:, 3].detach())
    grid = torch.stack(states)  # (colours, shapes, D)
    return float(grid.mean(0).var(0).sum()), float(grid.mean(1).var(0).sum())


@pytest.mark.slow
def test_the_state_at_a_shapes_word_encodes_it_after_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    clip = new_clip(tokenizer)
    with torch.no_grad():  # as in a tower that cares for colours alone
        vectors = clip.text_model.embeddings.token_embedding.weight
        shapes = [tokenizer.convert_tokens_to_ids(shape + "</w>") for shape in SHAPES]
        vectors[shapes] = vectors[shapes].mean(0) + 0.01 * (vectors[shapes] - vectors[shapes].mean(0))
    captions = [f"a {color} {shape} on a black background" for color in ("red", "blue", "pink") for shape in SHAPES]
    ends = token_ids(tokenizer, captions, 12)
    pooled = clip.text_model(ends).pooler_output.detach()
    shape, color = variance_of_words(clip.text_model, tokenizer)
    assert shape < color / 50
    config = LoopConfig(steps=100, learning_rate=3e-3, warmup=10, weight_decay=0.0)
    assert train_words(clip, tokenizer, captions, config, tmp_path, batch=16)
    shape, color = variance_of_words(clip.text_model, tokenizer)
    assert shape > color / 6
    after = clip.text_model(ends).pooler_output.detach()
    assert float((after - pooled).square().mean()) < 0.1 * float(pooled.square().mean())
