"""The small CLIP of the embedded base: its text tower conditions the U-Net, both towers compute the CLIP score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from localctl.micro.scenes import RELATIONS
from localctl.micro.shapes import BACKGROUNDS, COLORS, SHAPES
from research.micro_base.data import SceneCache
from research.micro_base.loop import LoopConfig, train

MAX_LENGTH = 77
TRAIN_LENGTH = 48  # with causal attention, a caption's states do not depend on the padding after it
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_EXTRA_WORDS = (
    "a an and on the of to left right background striped dotted two three four five six its with is has in , ."
)


def new_tokenizer() -> CLIPTokenizer:
    """Return a byte-level BPE tokenizer: each word of the caption grammar is one token, any other is split.

    The ids are the same in every process, because weights depend on them.
    """
    plural = [s + ("es" if s == "cross" else "s") for s in SHAPES]
    words = [*SHAPES, *plural, *COLORS, *BACKGROUNDS, *" ".join(RELATIONS).split(), *_EXTRA_WORDS.split()]
    trainer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trainer.pre_tokenizer = Whitespace()
    # Merges of equal frequency are ordered by the ids of their parts; last letters would get their ids in the random
    # order of a hash map, so they are special tokens.
    last_letters = sorted({word[-1] + "</w>" for word in words})
    trainer.train_from_iterator(
        [" ".join(words)],
        BpeTrainer(
            vocab_size=100_000,
            min_frequency=1,
            end_of_word_suffix="</w>",
            special_tokens=last_letters,
            show_progress=False,
        ),
    )
    merges = _merges(trainer)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    vocab: dict[str, int] = {}
    for token in [*tokens, "<|startoftext|>", "<|endoftext|>"]:
        vocab.setdefault(token, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return an untrained CLIP."""
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH, "pad_token_id": ids["eos_token_id"]}
    config = CLIPConfig(
        text_config={**tower, **text, **ids, "projection_dim": 128},
        vision_config={**tower, "image_size": 128, "patch_size": 16, "projection_dim": 128},
        projection_dim=128,
    )
    return CLIPModel(config)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str], length: int = MAX_LENGTH) -> Tensor:
    """Return the padded token ids (texts, length)."""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def preprocess(images: np.ndarray) -> Tensor:
    """Return images uint8 (B, 128, 128, 3) as normalised float (B, 3, 128, 128)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def corrupt(caption: str, rng: np.random.Generator) -> str:
    """Return a hard negative of a caption: two colours or shapes or a relation swapped, or one word changed."""
    words = caption.replace(",", " ,").split()
    places = {
        kind: [i for i, w in enumerate(words) if w in names and not (kind == "color" and words[-1] == w)]
        for kind, names in (("color", COLORS), ("shape", SHAPES), ("background", BACKGROUNDS))
    }
    out = list(words)
    kind = str(rng.choice(["color", "shape", "relation", "background"], p=[0.4, 0.35, 0.15, 0.1]))
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    turned = [i for i, w in enumerate(words) if w in opposite]
    if kind == "relation" and turned:
        out[turned[0]] = opposite[words[turned[0]]]
    elif kind == "background" and places["background"]:
        i = places["background"][0]
        out[i] = str(rng.choice([b for b in BACKGROUNDS if b != words[i]]))
    else:
        kind = kind if kind in ("color", "shape") else "shape"
        spots, names = places[kind], list(COLORS if kind == "color" else SHAPES)
        distinct = len({words[i] for i in spots}) > 1
        if distinct and rng.random() < 0.6:
            i, j = next((a, b) for a in spots for b in spots if words[a] != words[b])
            out[i], out[j] = words[j], words[i]
        else:
            i = int(rng.choice(spots))
            out[i] = str(rng.choice([n for n in names if n != words[i]]))
    return " ".join(out).replace(" ,", ",")


def contrastive_loss(model: CLIPModel, images: Tensor, ids: Tensor, positives: Tensor) -> dict[str, Tensor]:
    """Return the symmetric InfoNCE loss and the top-1 accuracy.

    ids: the first B texts belong to the B images, the others are hard negatives. positives: bool (B, texts), true
    where a text equals the image's own, which is then no negative.
    """
    image = F.normalize(model.visual_projection(model.vision_model(images).pooler_output), dim=-1)  # (B, D)
    text = F.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)  # (T, D)
    logits = image @ text.T * model.logit_scale.clamp(max=4.6052).exp()  # (B, T)
    count = len(images)
    own = torch.arange(count)
    duplicate = positives.clone()
    duplicate[own, own] = False
    logits = logits.masked_fill(duplicate, -1e4)
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, :count].T, own)) / 2
    return {"loss": loss, "top1": (logits.argmax(1) == own).float().mean()}


def train_clip(
    caches: list[SceneCache],
    tokenizer: CLIPTokenizer,
    config: LoopConfig,
    folder: Path,
    batch: int = 128,
    model: CLIPModel | None = None,
    tune_text: bool = False,
) -> tuple[CLIPModel, bool]:
    """Train a new CLIP, or tune ``model``; return it, and whether all steps are done.

    tune_text: also the text tower of ``model``; if not, the vision tower and both projections alone, for a U-Net that
    was trained on the states of the text tower.
    """
    torch.manual_seed(config.seed)
    name = "clip" if model is None else "clip_vision"
    if model is None:
        model = new_clip(tokenizer)
    else:
        model.text_model.requires_grad_(tune_text)

    def loss_fn(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        cache = caches[0] if rng.random() < 0.85 else caches[-1]
        chosen = np.sort(rng.choice(len(cache), min(batch, len(cache)), replace=False))
        captions = [cache.captions[i] for i in chosen]
        texts = captions + [corrupt(c, rng) for c in captions]
        ids = token_ids(tokenizer, texts, TRAIN_LENGTH)
        ids = ids[:, : int((ids != tokenizer.eos_token_id).sum(1).max()) + 1]
        codes = {t: i for i, t in enumerate(dict.fromkeys(texts))}
        own = torch.tensor([codes[t] for t in texts])
        return contrastive_loss(model, preprocess(cache.images[chosen]), ids, own[: len(chosen), None] == own[None])

    done = train(name, model, loss_fn, config, folder)
    return model, done


@torch.no_grad()
def retrieval_top1(model: CLIPModel, tokenizer: CLIPTokenizer, images: np.ndarray, captions: list[str]) -> float:
    """Return the share of images whose best caption is their own; an identical caption counts as their own."""
    model.eval()
    ids = token_ids(tokenizer, captions)
    image = F.normalize(model.visual_projection(model.vision_model(preprocess(images)).pooler_output), dim=-1)
    text = F.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)
    best = (image @ text.T).argmax(1).tolist()
    return float(np.mean([captions[b] == c for b, c in zip(best, captions, strict=True)]))
