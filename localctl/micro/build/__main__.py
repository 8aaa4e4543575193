"""Train the embedded base on procedural scenes; every part resumes where it stopped.

python -m localctl.micro.build --workdir outputs/micro                 # all parts, then export
python -m localctl.micro.build --parts unet export --minutes 60        # one more stretch of the U-Net
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from localctl.micro.build.clip import new_clip, new_tokenizer, train_clip
from localctl.micro.build.data import SceneCache, scene_cache
from localctl.micro.build.export import WEIGHTS, export, text_tower
from localctl.micro.build.loop import LoopConfig, read_weights
from localctl.micro.build.unet import latent_cache, new_unet, train_unet
from localctl.micro.build.vae import new_vae, set_scaling, train_vae

PARTS = ("vae", "clip", "unet", "export")


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
    parser.add_argument("--unet_scenes", type=int, default=20000, help="scenes whose latents are cached")
    parser.add_argument("--unet_steps", type=int, default=20000)
    parser.add_argument("--unet_batch", type=int, default=24)
    return parser.parse_args(argv)


def caches(args: argparse.Namespace) -> list[SceneCache]:
    folder = args.workdir / "cache"
    return [scene_cache(folder, "basic", args.scenes), scene_cache(folder, "rich", max(200, args.scenes * 2 // 15))]


def build_unet(args: argparse.Namespace, data: SceneCache) -> bool:
    tokenizer = new_tokenizer()
    clip, vae = new_clip(tokenizer), new_vae()
    clip.load_state_dict(read_weights(args.workdir / "clip.pt"))
    vae.load_state_dict(read_weights(args.workdir / "vae.pt"))
    set_scaling(vae, data)
    cache = latent_cache(data.head(args.unet_scenes), vae, text_tower(clip), tokenizer, args.workdir / "latents.pt")
    config = LoopConfig(steps=args.unet_steps, learning_rate=6e-4, ema=0.999, warmup=200, minutes=args.minutes)
    return train_unet(cache, config, args.workdir, args.unet_batch)[1]


def build_export(args: argparse.Namespace, data: SceneCache) -> int:
    tokenizer = new_tokenizer()
    clip, vae, unet = new_clip(tokenizer), new_vae(), new_unet()
    for name, model in (("clip", clip), ("vae", vae), ("unet", unet)):
        model.load_state_dict(read_weights(args.workdir / f"{name}.pt"))
    set_scaling(vae, data)
    return export(args.output_dir, vae, clip, tokenizer, unet)


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
    if "export" in args.parts:
        print(f"{args.output_dir}: {build_export(args, data[0]) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
