"""Tune the text tower so that the state at each word's position encodes that word.

The states of a tower trained on whole captions hold, at every position, what distinguishes captions, and hardly the
word itself: the state at a shape's word mostly encodes the colour before it (`python -m research.micro_base.word_use`).
A U-Net trained on such states learns colours and hardly shapes, and region control, which steers single words, has
little effect. Here each word gets a direction of its own, which is mixed into its state; the end tokens' states, which
give the contrastive features, do not change.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from research.micro_base.clip import token_ids
from research.micro_base.loop import LoopConfig, train

SHARE = 0.5  # share of a word's own direction in the squared norm of its state
SHORT = 32  # tokens; with causal attention, a state does not depend on later tokens
RANDOM_ROWS = 6  # rows per batch with tokens in random order, every other one with any tokens of the vocabulary


def word_directions(count: int, words: Tensor, width: int) -> Tensor:
    """Return unit vectors (count, width) of ``count`` tokens; those of ``words`` (ids) are orthogonal if possible."""
    random = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(count, width, generator=random), dim=-1)
    if len(words) <= width:
        directions[words] = torch.linalg.qr(torch.randn(width, len(words), generator=random)).Q.T
    return directions


def with_words(states: Tensor, ids: Tensor, directions: Tensor, special: tuple[int, ...], share: float) -> Tensor:
    """Return ``states`` (B, T, D) of tokens ``ids`` (B, T), with the tokens' directions mixed in.

    A state s becomes sqrt(1 - share) s/|s| + sqrt(share) d, scaled to the norm of s, where d is the direction of the
    token. States of ``special`` tokens do not change.
    """
    size = states.norm(dim=-1, keepdim=True)  # (B, T, 1)
    mixed = (1 - share) ** 0.5 * states / size + share**0.5 * directions[ids]
    is_word = ~torch.isin(ids, torch.tensor(special))
    return torch.where(is_word[..., None], size * F.normalize(mixed, dim=-1), states)


def train_words(
    clip: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str], config: LoopConfig, folder: Path, batch: int = 48
) -> bool:
    """Tune the text tower of ``clip`` towards :func:`with_words` of its states; return whether all steps are done.

    The loss is the squared error, with weight 5 at the first end token, which gives the contrastive feature.
    """
    torch.manual_seed(config.seed)
    before, tower = copy.deepcopy(clip.text_model).eval().requires_grad_(False), clip.text_model
    all_ids = token_ids(tokenizer, list(dict.fromkeys(captions)))
    bos, eos = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
    words = all_ids.unique()
    words = words[(words != bos) & (words != eos)]
    pieces = torch.tensor([token for token in range(len(tokenizer)) if token not in (bos, eos)])
    directions = word_directions(len(tokenizer), words, clip.config.text_config.hidden_size)

    def loss_fn(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        ids = all_ids[torch.from_numpy(rng.integers(len(all_ids), size=batch))]
        for row in range(min(RANDOM_ROWS, batch)):
            count = int(rng.integers(1, 20))
            chosen = rng.choice((words if row % 2 else pieces).numpy(), size=count)
            ids[row, 0], ids[row, 1:] = bos, eos
            ids[row, 1 : count + 1] = torch.from_numpy(chosen)
        ids = ids if step % 5 == 0 else ids[:, :SHORT]
        with torch.no_grad():
            wanted = with_words(before(ids).last_hidden_state, ids, directions, (bos, eos), SHARE)
        error = (tower(ids).last_hidden_state - wanted).square().mean(-1)  # (B, T)
        is_end = (ids == eos).cumsum(1) == 1
        return {"loss": (error * (1 + 4 * is_end)).mean(), "ends": error[is_end].mean().detach()}

    return train("words", tower, loss_fn, config, folder)
