"""Train the parts of the embedded base, each from its last checkpoint, and export them."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTokenizer

from research.micro_base.clip import new_clip, new_tokenizer, train_clip
from research.micro_base.data import SceneCache, scene_cache
from research.micro_base.export import export, text_tower
from research.micro_base.focus import make_focus
from research.micro_base.loop import LoopConfig, read_weights
from research.micro_base.unet import LatentCache, latent_cache, new_unet, train_unet
from research.micro_base.vae import load_decoder, new_vae, set_scaling, train_decoder, train_vae
from research.micro_base.words import train_words


def caches(args: argparse.Namespace) -> list[SceneCache]:
    """Return the caches of basic and of rich scenes."""
    folder = args.workdir / "cache"
    return [scene_cache(folder, "basic", args.scenes), scene_cache(folder, "rich", max(200, args.scenes * 2 // 15))]


def load_tokenizer(args: argparse.Namespace) -> CLIPTokenizer:
    """Return the tokenizer of workdir, else of the base to continue from, else a new one, and save it in workdir.

    Raises:
        ValueError: there are weights without the tokenizer that they were trained with.
    """
    folder = args.workdir / "tokenizer"
    if not folder.exists():
        if args.continue_from is not None:
            tokenizer = CLIPTokenizer.from_pretrained(args.continue_from / "tokenizer")
        elif (args.workdir / "clip.pt").exists():
            raise ValueError(f"{args.workdir} has clip.pt without its tokenizer; copy that of its exported base there.")
        else:
            tokenizer = new_tokenizer()
        unfinished = folder.with_suffix(".tmp")
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    return CLIPTokenizer.from_pretrained(folder)


def load_clip(args: argparse.Namespace, tokenizer: CLIPTokenizer, words: bool = True) -> CLIPModel:
    """Return the CLIP in its latest state. words: with the text tower that the part ``words`` tuned, if it did."""
    vision, whole = args.workdir / "clip_vision.pt", args.workdir / "clip.pt"
    if vision.exists() or whole.exists() or args.continue_from is None:
        clip = new_clip(tokenizer)
        clip.load_state_dict(read_weights(vision if vision.exists() else whole))
    else:
        clip = CLIPModel.from_pretrained(args.continue_from / "clip", dtype=torch.float32)
    if words and (args.workdir / "words.pt").exists():
        clip.text_model.load_state_dict(read_weights(args.workdir / "words.pt"))
    return clip


def load(args: argparse.Namespace, data: SceneCache) -> tuple[CLIPTokenizer, CLIPModel, AutoencoderKL]:
    """Return tokenizer, CLIP and VAE in their latest state: from workdir, else from the base to continue from."""
    tokenizer = load_tokenizer(args)
    clip = load_clip(args, tokenizer)
    if (args.workdir / "vae.pt").exists() or args.continue_from is None:
        vae = new_vae()
        vae.load_state_dict(read_weights(args.workdir / "vae.pt"))
        set_scaling(vae, data)
    else:
        vae = AutoencoderKL.from_pretrained(args.continue_from / "vae", dtype=torch.float32)
    if (args.workdir / "decoder.pt").exists():
        load_decoder(vae, read_weights(args.workdir / "decoder.pt"))
    return tokenizer, clip, vae


def unet_weights(args: argparse.Namespace, checkpoint: Path | None) -> dict[str, torch.Tensor] | None:
    """Return the weights of a checkpoint, else of the base to continue from; None without either."""
    if checkpoint is not None and checkpoint.exists():
        return read_weights(checkpoint)
    if args.continue_from is None:
        return None
    return UNet2DConditionModel.from_pretrained(args.continue_from / "unet", dtype=torch.float32).state_dict()


def latents(args: argparse.Namespace, data: SceneCache) -> LatentCache:
    """Return the cached latents; the file name has a hash of all they depend on, so changed weights get new ones."""
    tokenizer, clip, vae = load(args, data)
    digest = hashlib.sha256(str((args.scenes, args.unet_scenes)).encode())
    for part in (vae.encoder, vae.quant_conv, clip.text_model):
        for value in part.state_dict().values():
            digest.update(value.contiguous().numpy().tobytes())
    path = args.workdir / f"latents-{digest.hexdigest()[:12]}.pt"
    return latent_cache(data.head(args.unet_scenes), vae, text_tower(clip), tokenizer, path)


def build_words(args: argparse.Namespace, data: list[SceneCache]) -> bool:
    tokenizer = load_tokenizer(args)
    config = LoopConfig(steps=args.words_steps, learning_rate=1.5e-3, warmup=50, weight_decay=0.0, minutes=args.minutes)
    captions = [caption for cache in data for caption in cache.captions]
    return train_words(load_clip(args, tokenizer, words=False), tokenizer, captions, config, args.workdir)


def build_unet(args: argparse.Namespace, data: SceneCache) -> bool:
    config = LoopConfig(steps=args.unet_steps, learning_rate=6e-4, ema=0.999, warmup=200, minutes=args.minutes)
    cache, initial = latents(args, data), unet_weights(args, args.unet_init)
    focus = make_focus(len(cache.latents), args.workdir / f"focus-{len(cache.latents)}.pt")
    options = {"initial": initial, "prediction_type": args.prediction_type, "focus": focus}
    return train_unet(cache, config, args.workdir, args.unet_batch, **options)[1]


def build_decoder(args: argparse.Namespace, data: SceneCache) -> bool:
    vae = load(args, data)[2]
    config = LoopConfig(steps=args.decoder_steps, learning_rate=7e-4, weight_decay=0.0, minutes=args.minutes)
    return train_decoder(vae, latents(args, data).latents, data.images, config, args.workdir)


def build_clip_vision(args: argparse.Namespace, data: list[SceneCache]) -> bool:
    tokenizer, clip, _ = load(args, data[0])
    config = LoopConfig(steps=args.clip_vision_steps, learning_rate=5e-4, weight_decay=0.05, minutes=args.minutes)
    return train_clip(data, tokenizer, config, args.workdir, model=clip)[1]


def build_export(args: argparse.Namespace, data: SceneCache) -> int:
    tokenizer, clip, vae = load(args, data)
    weights = unet_weights(args, args.workdir / "unet.pt")
    if weights is None:
        raise ValueError(f"There is no U-Net in {args.workdir}; train one with --parts unet, or give --continue_from.")
    unet = new_unet()
    unet.load_state_dict(weights)
    return export(args.output_dir, vae, clip, tokenizer, unet, args.prediction_type)


def build(args: argparse.Namespace) -> None:
    """Train and export the parts that were asked for."""
    if args.threads:
        torch.set_num_threads(args.threads)
    data = caches(args)
    if "vae" in args.parts:
        config = LoopConfig(steps=args.vae_steps, learning_rate=1e-3, weight_decay=0.0, minutes=args.minutes)
        train_vae(data, config, args.workdir)
    if "clip" in args.parts:
        config = LoopConfig(steps=args.clip_steps, learning_rate=1e-3, weight_decay=0.05, minutes=args.minutes)
        train_clip(data, load_tokenizer(args), config, args.workdir)
    if "words" in args.parts:
        build_words(args, data)
    if "unet" in args.parts:
        build_unet(args, data[0])
    if "decoder" in args.parts:
        build_decoder(args, data[0])
    if "clip_vision" in args.parts:
        build_clip_vision(args, data)
    if "export" in args.parts:
        print(f"{args.output_dir}: {build_export(args, data[0]) / 2**20:.1f} MiB")
