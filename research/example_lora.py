"""Train the example LoRA: scenes at night, with the embedded base's own captions.

  python -m research.example_lora

Whatever its caption says of the background, a scene is black around its objects; so the LoRA learns the style alone. It
takes two and a half minutes of one core and writes examples/lora/night.safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading

PROGRAM = "research.example_lora"
_RANK, _BATCH, _SCENES = 4, 8, 512
_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Train and save it; return 0."""
    parser = Arguments(PROGRAM, __doc__)
    parser.add_argument("--steps", type=int, default=400, help="updates")
    parser.add_argument("--output", default="examples/lora/night.safetensors", help="the file")
    options = parser.read(argv)
    with loading():
        path = train(options.steps, Path(options.output))
    print(path)
    return 0


def train(steps: int, path: Path) -> Path:
    """Train for so many updates and write the LoRA, in half precision."""
    import torch
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file
    from torch.nn import functional as F

    from localctl.diffusion import add_noise, encode, training_target
    from localctl.pipelines import encode_captions, load_pipeline
    from localctl.seeding import generator
    from research.training_loop import learning_rate_at, updates

    pipe: Any = load_pipeline("micro")
    pixels, captions = _night_scenes()
    with torch.no_grad():
        latents = torch.cat([encode(pipe.vae, batch) for batch in pixels.split(32)])
        texts = encode_captions(pipe, captions).states
    torch.manual_seed(0)  # of PEFT's first factors
    pipe.unet.add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=list(_LAYERS)))
    alphas = pipe.scheduler.alphas_cumprod
    optimizer = torch.optim.AdamW([p for p in pipe.unet.parameters() if p.requires_grad], lr=0)

    def loss(step: int) -> tuple[torch.Tensor, float]:
        rng = generator(step, "example_lora")
        rows = torch.randint(len(latents), (_BATCH,), generator=rng)
        timesteps = torch.randint(len(alphas), (_BATCH,), generator=rng)
        noise = torch.randn(latents[rows].shape, generator=rng)
        sample = add_noise(latents[rows], noise, timesteps, alphas)
        output = pipe.unet(sample.noisy, timesteps, texts[rows]).sample
        value = F.mse_loss(output, training_target(sample, alphas, pipe.scheduler.config.prediction_type))
        return value, float(value.detach())

    rate = [learning_rate_at(step, 1e-3, steps, 20) for step in range(steps)]
    for step, value in updates(optimizer, range(steps), rate.__getitem__, loss):
        if step % 50 == 0:
            print(f"{step} updates, loss {value:.4f}", file=sys.stderr)
    state = {f"unet.{name}": value.half() for name, value in get_peft_model_state_dict(pipe.unet).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def _night_scenes() -> tuple[Any, list[str]]:
    """Return the pixels (n, 3, H, W) in [-1, 1] of scenes at night, and their captions."""
    import numpy as np
    import torch

    from localctl.micro.scenes import scene
    from localctl.micro.shapes import BACKGROUNDS

    images, captions = [], []
    for index in range(_SCENES):
        found = scene(index)
        objects = found.masks.max(axis=0)[..., None]
        images.append((found.image * objects + np.asarray(BACKGROUNDS["black"]) * (1 - objects)) / 127.5 - 1)
        captions.append(found.caption)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float(), captions


if __name__ == "__main__":
    sys.exit(main())
