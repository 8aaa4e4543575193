"""Tune a copy of the text tower so that the states of a caption's words tell which object is on which side.

A causal encoder reads "a red circle to the left of a blue star" from left to right: the states of "red circle" cannot
know of the relation, and those of "blue star" hardly tell of it (`python -m research.micro_base.word_use --relations`).
Here the second object's words get the direction of its side, and the word of the relation repeats the first object's
words, with the direction of that one's side. All other states stay as they were. The CLIP keeps its own tower.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from research.micro_base.clip import token_ids
from research.micro_base.loop import LoopConfig, train
from research.micro_base.objects import SIDES, roles_of
from research.micro_base.words import word_directions

SHARE = 0.35  # share of the side's direction in the squared norm of a state
REPEAT = 0.65  # share of the first object's words in what is left of the state of the relation's word
LENGTH = 32  # tokens; with causal attention, a state does not depend on later tokens
RANDOM = 0.25  # share of texts of any words, whose states stay


def with_roles(states: Tensor, roles: list[tuple[int, int, int, str] | None], sides: Tensor) -> Tensor:
    """Return ``states`` (B, T, D) with the roles of each caption mixed in; ``sides``: unit vectors (4, D)."""
    wanted = states.clone()
    for row, found in enumerate(roles):
        if found is None:
            continue
        first, relation, second, word = found
        of_first, of_second = (sides[side] for side in SIDES[word])
        subject = states[row, first : first + 2].mean(0)
        own = states[row, relation]
        repeated = REPEAT**0.5 * F.normalize(subject, dim=-1) + (1 - REPEAT) ** 0.5 * F.normalize(own, dim=-1)
        wanted[row, relation] = subject.norm() * _mixed(repeated, of_first)
        for place in (second, second + 1):
            wanted[row, place] = states[row, place].norm() * _mixed(states[row, place], of_second)
    return wanted


def _mixed(state: Tensor, direction: Tensor) -> Tensor:
    return F.normalize((1 - SHARE) ** 0.5 * F.normalize(state, dim=-1) + SHARE**0.5 * direction, dim=-1)


def train_roles(
    tower: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    captions: list[str],
    config: LoopConfig,
    folder: Path,
    batch: int = 48,
) -> bool:
    """Tune ``tower`` towards :func:`with_roles` of its states; return whether all steps are done.

    Half of the captions have a relation, a quarter are any, and in the others words are in random order. The loss is
    the squared error, with weight 4 at the words with a role.
    """
    torch.manual_seed(config.seed)
    before = copy.deepcopy(tower).eval().requires_grad_(False)
    distinct = list(dict.fromkeys(captions))
    roles = [roles_of(caption) for caption in distinct]
    related = np.flatnonzero([found is not None for found in roles])
    if not len(related):
        raise ValueError("No caption has a relation of two objects; render more --scenes.")
    all_ids = token_ids(tokenizer, distinct, LENGTH)
    special = torch.tensor([int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)])
    words = all_ids.unique()
    words = words[~torch.isin(words, special)]
    sides = word_directions(4, torch.arange(4), tower.config.hidden_size)

    def loss_fn(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        chosen = rng.integers(len(distinct), size=batch)
        chosen[: batch // 2] = rng.choice(related, batch // 2)
        ids = all_ids[torch.from_numpy(chosen)]
        found = [roles[i] for i in chosen]
        for row in range(batch - round(RANDOM * batch), batch):
            count = int(rng.integers(1, LENGTH - 2))
            ids[row, 1:] = special[1]
            ids[row, 1 : count + 1] = torch.from_numpy(rng.choice(words.numpy(), size=count))
            found[row] = None
        with torch.no_grad():
            states = before(ids).last_hidden_state
            wanted = with_roles(states, found, sides)
        error = (tower(ids).last_hidden_state - wanted).square().mean(-1)  # (B, T)
        changed = (wanted != states).any(-1)  # (B, T)
        kept = error[~changed].mean()
        return {
            "loss": (error * (1 + 3 * changed)).mean(),
            "roles": error[changed].mean().detach(),
            "others": kept.detach(),
        }

    return train("roles", tower, loss_fn, config, folder)
