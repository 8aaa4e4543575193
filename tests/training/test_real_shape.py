"""One training step of Stable Diffusion 1.5's real shape, with random weights: minutes and several GB."""

import resource
import time

import pytest
import torch
from conftest import tiny_scheduler, tiny_tokenizer
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from training_helpers import tiny_settings
from transformers import CLIPTextConfig, CLIPTextModel

from localctl.architectures import TABLE, BaseShape
from localctl.data import Batch
from localctl.pipelines import freeze
from localctl.training.adapter_plan import plan_adapter
from localctl.training.cost import GIB, Estimator
from localctl.training.models import Models
from localctl.training.optimizer import make_optimizer, optimizer_class
from localctl.training.step import sample_noise, training_step

SIDE = 512


def real_pipeline() -> StableDiffusionPipeline:
    parts, tokenizer = TABLE["sd15"], tiny_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(dict(parts["vae"])),
        text_encoder=CLIPTextModel(CLIPTextConfig(**parts["text_encoder"], **ends)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_config(dict(parts["unet"])),
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        freeze(part)
    return pipe


@pytest.mark.slow
def test_one_step_of_sd15_at_512_px(tmp_path):
    torch.manual_seed(0)
    settings = tiny_settings("sd15", tmp_path, lr_warmup_steps=0, mixed_precision="no", train_batch_size=1)
    shape = BaseShape(TABLE["sd15"])
    adapter = plan_adapter(settings, shape).make(0)
    models = Models(real_pipeline(), adapter.train())
    optimizer = make_optimizer(optimizer_class(settings), list(adapter.parameters()), settings)
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 100:400, 50:450] = 1
    batch = Batch(
        ("a",),
        (0,),
        ("a cat",),
        torch.rand(1, 3, SIDE, SIDE) * 2 - 1,
        (torch.rand(1, 1, SIDE, SIDE) > 0.9).float(),
        mask,
    )
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    begun = time.perf_counter()
    output = training_step(batch, models, settings, sample_noise(batch, models.latent_shape(SIDE, SIDE), settings))
    output.loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    expected = Estimator(settings, shape).estimate(settings, (SIDE, SIDE)).total
    print(f"\n{seconds:.0f} s, peak {peak / GIB:.2f} GiB, estimated {expected / GIB:.2f} GiB")
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True)]
    assert all(moved)
    assert all(p.grad is None for part in models.frozen.values() for p in part.parameters())
    assert expected < peak < expected + 3 * GIB  # the interpreter, its libraries and their work space
