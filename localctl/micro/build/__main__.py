"""Train the embedded base on procedural scenes; every part resumes where it stopped.

python -m localctl.micro.build --workdir outputs/micro                 # all parts, then export
python -m localctl.micro.build --parts unet export --minutes 60        # one more stretch of the U-Net
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTokenizer

from localctl.micro.build.clip import new_clip, new_tokenizer, train_clip
from localctl.micro.build.data import SceneCache, scene_cache
from localctl.micro.build.export import WEIGHTS, export, text_tower
from localctl.micro.build.loop import LoopConfig, read_weights
from localctl.micro.build.unet import LatentCache, latent_cache, new_unet, train_unet
from localctl.micro.build.vae import load_decoder, new_vae, set_scaling, train_decoder, train_vae

PARTS = ("vae", "clip", "unet", "decoder", "clip_vision", "export")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="localctl.micro.build", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("outputs/micro"), help="caches and checkpoints")
    parser.add_argument("--output_dir", type=Path, default=WEIGHTS, help="where the finished base is written")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=0, help="stop each part after so long; run again to go on")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0 = all)")
    parser.add_argument("--scenes", type=int, default=30000)
    parser.add_argument("--vae_steps", type=int, default=1850)
    parser.add_argument("--clip_steps", type=int, default=950)
    parser.add_argument("--decoder_steps", type=int, default=900, help="decoder alone, on the U-Net's latents")
    parser.add_argument("--clip_vision_steps", type=int, default=500, help="vision tower alone")
    parser.add_argument("--unet_scenes", type=int, default=20000, help="scenes whose latents are cached")
    parser.add_argument("--unet_steps", type=int, default=20000)
    parser.add_argument("--unet_batch", type=int, default=24)
    parser.add_argument(
        "--unet_init", type=Path, help="checkpoint or U-Net folder whose weights a new U-Net starts from"
    )
    parser.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), default="v_prediction")
    return parser.parse_args(argv)


def caches(args: argparse.Namespace) -> list[SceneCache]:
    folder = args.workdir / "cache"
    return [scene_cache(folder, "basic", args.scenes), scene_cache(folder, "rich", max(200, args.scenes * 2 // 15))]


def load(args: argparse.Namespace, data: SceneCache) -> tuple[CLIPTokenizer, CLIPModel, AutoencoderKL]:
    """Tokenizer, CLIP and VAE in their latest state."""
    tokenizer = new_tokenizer()
    clip, vae = new_clip(tokenizer), new_vae()
    vision = args.workdir / "clip_vision.pt"
    clip.load_state_dict(read_weights(vision if vision.exists() else args.workdir / "clip.pt"))
    vae.load_state_dict(read_weights(args.workdir / "vae.pt"))
    set_scaling(vae, data)
    if (args.workdir / "decoder.pt").exists():
        load_decoder(vae, read_weights(args.workdir / "decoder.pt"))
    return tokenizer, clip, vae


def latents(args: argparse.Namespace, data: SceneCache) -> LatentCache:
    tokenizer, clip, vae = load(args, data)
    return latent_cache(data.head(args.unet_scenes), vae, text_tower(clip), tokenizer, args.workdir / "latents.pt")


def build_unet(args: argparse.Namespace, data: SceneCache) -> bool:
    config = LoopConfig(steps=args.unet_steps, learning_rate=6e-4, ema=0.999, warmup=200, minutes=args.minutes)
    initial = None
    if args.unet_init is not None and args.unet_init.is_dir():
        initial = UNet2DConditionModel.from_pretrained(args.unet_init, dtype=torch.float32).state_dict()
    elif args.unet_init is not None:
        initial = read_weights(args.unet_init)
    cache = latents(args, data)
    options = {"initial": initial, "prediction_type": args.prediction_type}
    return train_unet(cache, config, args.workdir, args.unet_batch, **options)[1]


def build_decoder(args: argparse.Namespace, data: SceneCache) -> bool:
    vae = load(args, data)[2]
    config = LoopConfig(steps=args.decoder_steps, learning_rate=7e-4, weight_decay=0.0, minutes=args.minutes)
    return train_decoder(vae, latents(args, data).latents, data.images, config, args.workdir)


def build_clip_vision(args: argparse.Namespace, data: list[SceneCache]) -> bool:
    tokenizer, clip, _ = load(args, data[0])
    config = LoopConfig(steps=args.clip_vision_steps, learning_rate=5e-4, weight_decay=0.05, minutes=args.minutes)
    return train_clip(data, config, args.workdir, model=clip)[1]


def build_export(args: argparse.Namespace, data: SceneCache) -> int:
    tokenizer, clip, vae = load(args, data)
    unet = new_unet()
    unet.load_state_dict(read_weights(args.workdir / "unet.pt"))
    return export(args.output_dir, vae, clip, tokenizer, unet, args.prediction_type)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    data = caches(args)
    if "vae" in args.parts:
        config = LoopConfig(steps=args.vae_steps, learning_rate=1e-3, weight_decay=0.0, minutes=args.minutes)
        train_vae(data, config, args.workdir)
    if "clip" in args.parts:
        config = LoopConfig(steps=args.clip_steps, learning_rate=1e-3, weight_decay=0.05, minutes=args.minutes)
        train_clip(data, config, args.workdir)
    if "unet" in args.parts:
        build_unet(args, data[0])
    if "decoder" in args.parts:
        build_decoder(args, data[0])
    if "clip_vision" in args.parts:
        build_clip_vision(args, data)
    if "export" in args.parts:
        print(f"{args.output_dir}: {build_export(args, data[0]) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
