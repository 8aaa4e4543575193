"""Train the parts of the embedded base, each from its last checkpoint, and export them."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from localctl.diffusion import FLOW
from localctl.distributed import process_device
from research.micro_base.clip import new_clip, new_tokenizer, token_ids, train_clip
from research.micro_base.clock import ClockConfig
from research.micro_base.data import TrainingScenes
from research.micro_base.export import export, export_transformer, text_tower
from research.micro_base.focus import expected_latents, make_focus
from research.micro_base.loop import LoopConfig, digest, read_weights
from research.micro_base.preference import MISTAKES, wrong_latents
from research.micro_base.roles import train_roles
from research.micro_base.transformer import (
    encoder,
    load_teacher,
    new_pipeline,
    new_transformer,
    patch_of,
    transformer_kind,
)
from research.micro_base.unet import UNET, Encode, Kind, encode_images, latent_cache, new_unet, train_denoiser
from research.micro_base.unet_loss import LatentCache, Recipe
from research.micro_base.vae import load_decoder, new_vae, set_scaling, train_decoder, train_vae
from research.micro_base.words import train_words


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


def load_text(args: argparse.Namespace, clip: CLIPModel, roles: bool = True) -> CLIPTextModel:
    """Return the text encoder of the U-Net: the text tower of the CLIP, unless a part ``roles`` tuned a copy of it.

    roles: with what this part trained in workdir.
    """
    text, given = text_tower(clip), args.continue_from
    own = any((args.workdir / f"{part}.pt").exists() for part in ("clip", "words"))
    if given is not None and not own:
        text = CLIPTextModel.from_pretrained(given / "text_encoder", dtype=torch.float32).eval()
    if roles and (args.workdir / "roles.pt").exists():
        text.load_state_dict(read_weights(args.workdir / "roles.pt"))
    return text


def load(args: argparse.Namespace, data: TrainingScenes) -> tuple[CLIPTokenizer, CLIPModel, AutoencoderKL]:
    """Return tokenizer, CLIP and VAE in their latest state: from workdir, else from the base to continue from."""
    tokenizer = load_tokenizer(args)
    clip = load_clip(args, tokenizer)
    if (args.workdir / "vae.pt").exists() or args.continue_from is None:
        vae = new_vae()
        vae.load_state_dict(read_weights(args.workdir / "vae.pt"))
        set_scaling(vae, data.basic)
    else:
        vae = AutoencoderKL.from_pretrained(args.continue_from / "vae", dtype=torch.float32)
    if (args.workdir / "decoder.pt").exists():
        load_decoder(vae, read_weights(args.workdir / "decoder.pt"))
    return tokenizer, clip, vae


def denoiser_weights(args: argparse.Namespace, checkpoint: Path | None) -> dict[str, torch.Tensor] | None:
    """Return the weights of a checkpoint, else of --unet_init, else of the base to continue from; None without any."""
    for path in (checkpoint, args.unet_init):
        if path is not None and path.exists():
            return read_weights(path)
    if args.continue_from is None or args.denoiser == "transformer":  # that base has a U-Net
        return None
    return UNet2DConditionModel.from_pretrained(args.continue_from / "unet", dtype=torch.float32).state_dict()


def latents(args: argparse.Namespace, data: TrainingScenes) -> LatentCache:
    """Return the cached latents; the file name has a hash of all they depend on, so changed weights get new ones."""
    tokenizer, clip, vae = load(args, data)
    is_transformer = args.denoiser == "transformer"
    of = str((args.scenes, args.unet_scenes, *[args.denoiser] * is_transformer))
    text = text_tower(clip) if is_transformer else load_text(args, clip)
    path = args.workdir / f"latents-{digest(of, vae.encoder, vae.quant_conv, text)}.pt"
    device = process_device(args.device)
    if is_transformer:
        encode = encoder(new_pipeline(vae, clip, tokenizer, new_transformer()).to(device))
    else:
        encode = _last_states(text.to(device), tokenizer)
    return latent_cache(data.basic.head(args.unet_scenes), vae.to(device), encode, tokenizer, path)


def _last_states(text: CLIPTextModel, tokenizer: CLIPTokenizer) -> Encode:
    """Return a function that encodes texts as Stable Diffusion 1's pipeline does."""
    return lambda texts: text(token_ids(tokenizer, texts).to(text.device)).last_hidden_state


def build_words(args: argparse.Namespace, data: TrainingScenes) -> bool:
    tokenizer = load_tokenizer(args)
    config = LoopConfig(steps=args.words_steps, learning_rate=1.5e-3, warmup=50, weight_decay=0.0, minutes=args.minutes)
    captions = [caption for cache in data.both for caption in cache.captions]
    return train_words(load_clip(args, tokenizer, words=False), tokenizer, captions, config, args.workdir)


def build_roles(args: argparse.Namespace, data: TrainingScenes) -> bool:
    tokenizer = load_tokenizer(args)
    text = load_text(args, load_clip(args, tokenizer), roles=False)
    config = LoopConfig(steps=args.roles_steps, learning_rate=1.5e-3, warmup=50, weight_decay=0.0, minutes=args.minutes)
    return train_roles(text, tokenizer, data.basic.captions, config, args.workdir)


def check_patch(args: argparse.Namespace) -> None:
    """Raise a ValueError if the transformer to go on with has other tokens than --patch says."""
    weights = denoiser_weights(args, args.workdir / f"{args.denoiser}.pt") if args.denoiser == "transformer" else None
    if weights is not None and patch_of(weights) != args.patch:
        raise ValueError(f"--patch {args.patch} is not that of the weights to start from; give {patch_of(weights)}.")


def denoiser_kind(args: argparse.Namespace, data: TrainingScenes, cache: LatentCache, device: torch.device) -> Kind:
    """Return the kind of denoiser to train, with its teacher."""
    if args.denoiser == "unet":
        return UNET
    if args.teacher is None:
        return transformer_kind(args.patch)
    captions = data.basic.captions[: len(cache.latents)]
    return transformer_kind(args.patch, load_teacher(args.teacher, cache, captions, args.workdir, device))


def build_unet(args: argparse.Namespace, data: TrainingScenes, started: float) -> bool:
    """Train the denoiser; ``started``: ``time.monotonic()`` when --unet_minutes began."""
    check_patch(args)
    recipe = Recipe(FLOW if args.denoiser == "transformer" else args.prediction_type, noisy=args.unet_noisy)
    cache, initial = latents(args, data), denoiser_weights(args, None)
    count = len(cache.latents)
    focus = make_focus(count, args.workdir / f"words-of-{count}.pt", args.unet_mix, args.unet_relations)
    if args.unet_relations:
        focus = replace(focus, expected=expected_latents(cache.latents, data.basic.captions[:count]))
    config: LoopConfig | ClockConfig
    if args.unet_minutes:
        seconds = started + 60 * args.unet_minutes - time.monotonic()
        if seconds <= 0:
            raise ValueError(
                f"--unet_minutes {args.unet_minutes:g} were over {-seconds:.0f} s before the scenes were encoded; "
                "give more, or fewer --scenes and --unet_scenes (those encoded so far are reused)."
            )
        config = ClockConfig(seconds=seconds, learning_rate=args.unet_lr)
    else:
        config = LoopConfig(
            steps=args.unet_steps,
            learning_rate=args.unet_lr,
            ema=0.999,
            warmup=200,
            minutes=args.minutes,
            checkpoint_every=100,
        )
    device = process_device(args.device)
    kind = denoiser_kind(args, data, cache, device)
    wrong = wrong_images(args, data, count, device) if args.unet_prefer else None
    of_loss = {"recipe": recipe, "initial": initial, "focus": focus, "wrong": wrong, "prefer": args.unet_prefer}
    _, done = train_denoiser(
        kind, cache, config, args.workdir, args.unet_batch, **of_loss, device=device, bf16=args.bf16
    )
    return done


def wrong_images(args: argparse.Namespace, data: TrainingScenes, count: int, device: torch.device) -> torch.Tensor:
    """Return latents of a wrong image for each of the denoiser's ``count`` scenes."""
    vae = load(args, data)[2].to(device)
    path = args.workdir / f"wrong-{count}-{digest(str(MISTAKES), vae.encoder, vae.quant_conv)}.pt"
    return wrong_latents(count, partial(encode_images, vae), path)


def build_decoder(args: argparse.Namespace, data: TrainingScenes) -> bool:
    vae = load(args, data)[2]
    config = LoopConfig(steps=args.decoder_steps, learning_rate=7e-4, weight_decay=0.0, minutes=args.minutes)
    return train_decoder(vae, latents(args, data).latents, data.basic.images, config, args.workdir)


def build_clip_vision(args: argparse.Namespace, data: TrainingScenes) -> bool:
    tokenizer, clip, _ = load(args, data)
    config = LoopConfig(
        steps=args.clip_vision_steps, learning_rate=7e-4, weight_decay=0.05, ema=0.998, minutes=args.minutes
    )
    # A U-Net may have a text encoder of its own; the transformer has the CLIP's.
    is_free = args.denoiser == "unet" and digest("", load_text(args, clip)) != digest("", text_tower(clip))
    return train_clip(data.both, tokenizer, config, args.workdir, model=clip, tune_text=is_free)[1]


def build_export(args: argparse.Namespace, data: TrainingScenes) -> int:
    tokenizer, clip, vae = load(args, data)
    weights = denoiser_weights(args, args.workdir / f"{args.denoiser}.pt")
    if weights is None:
        name = {"unet": "U-Net", "transformer": "transformer"}[args.denoiser]
        raise ValueError(f"There is no {name} in {args.workdir}; train one with --parts unet, or give --continue_from.")
    if args.denoiser == "transformer":
        transformer = new_transformer(patch=patch_of(weights))
        transformer.load_state_dict(weights)
        return export_transformer(args.output_dir, vae, clip, tokenizer, transformer)
    unet = new_unet()
    unet.load_state_dict(weights)
    return export(args.output_dir, vae, clip, tokenizer, unet, args.prediction_type, load_text(args, clip))


def build(args: argparse.Namespace) -> None:
    """Train and export the parts that were asked for."""
    started = time.monotonic()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = TrainingScenes(args.workdir / "cache", args.scenes)
    if "vae" in args.parts:
        config = LoopConfig(steps=args.vae_steps, learning_rate=1e-3, weight_decay=0.0, minutes=args.minutes)
        train_vae(data.both, config, args.workdir)
    if "clip" in args.parts:
        config = LoopConfig(steps=args.clip_steps, learning_rate=1e-3, weight_decay=0.05, minutes=args.minutes)
        train_clip(data.both, load_tokenizer(args), config, args.workdir)
    if "words" in args.parts:
        build_words(args, data)
    if "roles" in args.parts:
        build_roles(args, data)
    elif args.denoiser == "unet" and (args.workdir / "roles.pt").exists():
        print(f"The text encoder is {args.workdir / 'roles.pt'}, of an earlier --parts roles; without it, the CLIP's.")
    if "unet" in args.parts:
        build_unet(args, data, started)
    if "decoder" in args.parts:
        build_decoder(args, data)
    if "clip_vision" in args.parts:
        build_clip_vision(args, data)
    if "export" in args.parts:
        print(f"{args.output_dir}: {build_export(args, data) / 2**20:.1f} MiB")
