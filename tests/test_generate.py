from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attachment_helpers import adapter_control
from diffusers import DiffusionPipeline, DPMSolverSDEScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

import localctl.sampling
from localctl.adapter import LocalAdapter
from localctl.control.image_controls import LocalAdapterControl
from localctl.layout import Layout
from localctl.pipelines import set_scheduler
from localctl.sampling import Attachment, generate, initial_noise

MakeAdapter = Callable[..., LocalAdapter]


@pytest.mark.parametrize("size", [(96, 160), (72, 88)])
def test_sizes_of_multiples_of_8(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline, size: Any) -> None:
    mask = torch.zeros(1, *size)
    mask[:, : size[0] // 2] = 1
    item = LocalAdapterControl(make_adapter(), torch.rand(1, *size), mask)
    layout = Layout("a b", *size)
    steered = generate(sd_pipe, layout, item, num_inference_steps=2, output_type="latent").images[0]
    plain = generate(sd_pipe, layout, num_inference_steps=2, output_type="latent").images[0]
    assert steered.shape == (4, size[0] // 8, size[1] // 8) and not torch.equal(steered, plain)


def check_seeds(pipe: DiffusionPipeline, item: LocalAdapterControl, **options: Any) -> None:
    """Noise of each picture torch.equal and pixels within 2/255 at any batch size."""
    runs = []
    for batch_size in (1, 2, 4):
        starts: list[Tensor] = []

        def look(module: Any, args: Any, kwargs: Any, starts: list[Tensor] = starts) -> None:
            if float(args[1]) == float(pipe.scheduler.timesteps[0]):
                starts.extend(args[0].chunk(2)[1].clone())

        hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
        seeds = (5, 0, -1)
        options = {"num_inference_steps": 3, **options}
        output = generate(pipe, ["cat", "dogs"], item, seeds, batch_size=batch_size, **options)
        hook.remove()
        assert output.seeds == seeds * 2 and [item.prompt for item in output.layouts] == ["cat"] * 3 + ["dogs"] * 3
        runs.append((torch.stack(starts), np.stack([np.asarray(image) for image in output.images]).astype(int)))
    for starts_of, pixels in runs[1:]:
        assert torch.equal(starts_of, runs[0][0])
        assert np.abs(pixels - runs[0][1]).max() <= 2
    assert np.abs(runs[0][1][0] - runs[0][1][1]).max() > 10  # other seeds, other pictures
    assert np.abs(runs[0][1][0] - runs[0][1][3]).max() > 2  # other layouts, other pictures


@pytest.mark.parametrize("scheduler", ["ddim", "euler_ancestral", "ddpm", "dpmpp_2m", "heun"])
def test_pictures_depend_on_their_own_seed_only(
    scheduler: str, make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    set_scheduler(sd_pipe, scheduler)
    check_seeds(sd_pipe, adapter_control(make_adapter(), 2), eta=1.0 if scheduler == "ddim" else 0.0)


def test_sdxl_pictures_depend_on_their_own_seed_only(
    xl_adapter: LocalAdapter, sdxl_pipe: StableDiffusionXLPipeline
) -> None:
    check_seeds(sdxl_pipe, adapter_control(xl_adapter, 2))


def test_a_shifted_row_is_found(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = Attachment.select
    monkeypatch.setattr(Attachment, "select", lambda self, rows: select(self, [rows[-1], *rows[:-1]]))
    with pytest.raises(ValueError, match="but the attached layout has"):
        check_seeds(sd_pipe, adapter_control(make_adapter(), 2))
    monkeypatch.undo()
    noise_of, calls = initial_noise, iter(range(100))
    wrong = {"initial_noise": lambda pipe, seed, *rest: noise_of(pipe, seed + (next(calls) == 7), *rest)}
    monkeypatch.setattr(localctl.sampling, "initial_noise", wrong["initial_noise"])
    with pytest.raises(AssertionError):
        check_seeds(sd_pipe, adapter_control(make_adapter(), 2))


def test_noise_is_scaled_once_and_the_same_in_half_precision(sd_pipe: StableDiffusionPipeline) -> None:
    set_scheduler(sd_pipe, "euler")
    seen: list[Tensor] = []
    sd_pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    generate(sd_pipe, "a", seeds=3, num_inference_steps=2, output_type="latent")
    scheduler = sd_pipe.scheduler
    sigma = scheduler.sigmas[0]
    expected = initial_noise(sd_pipe, 3, 64, 64) * scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5
    torch.testing.assert_close(seen[0][:1], expected)
    assert float(scheduler.init_noise_sigma) > 5  # scaled twice would show
    full = initial_noise(sd_pipe, 3, 64, 64)
    assert torch.equal(initial_noise(sd_pipe.to(torch.bfloat16), 3, 64, 64), full.bfloat16())


def test_negative_prompts_go_to_their_layouts(sd_pipe: StableDiffusionPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    both = generate(sd_pipe, ["a", "b"], seeds=(0, 1), negative_prompt=["x", "y"], **options).images
    for index, (prompt, negative) in enumerate((("a", "x"), ("b", "y"))):
        alone = generate(sd_pipe, prompt, seeds=(0, 1), negative_prompt=negative, **options).images
        torch.testing.assert_close(torch.stack(both[2 * index : 2 * index + 2]), torch.stack(alone), rtol=0, atol=1e-4)
    same = generate(sd_pipe, "b", seeds=(0, 1), negative_prompt="x", **options).images
    assert (torch.stack(both[2:]) - torch.stack(same)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "b"}, "'prompt' itself"),
        ({"generator": None}, "'generator' itself from layouts and seeds; give seeds=, one number for each image"),
        ({"num_images_per_prompt": 2}, "'num_images_per_prompt' itself"),
        ({"seeds": ()}, "no seed"),
        ({"batch_size": 0}, "at least 1, not 0"),
        ({"clip_skip": -1}, "clip skip must be at least 0, not -1"),
        ({"layout": [Layout("a", 64, 64), Layout("b", 72, 64)]}, r"differ: \(64, 64\), \(72, 64\)"),
        ({"layout": Layout("a", 64, 64), "height": 72, "width": 64}, r"differ: \(64, 64\), \(72, 64\)"),
        ({"height": 60, "width": 64}, "height 60 is not a positive multiple of 8; use 64"),
        ({"height": 64}, "both height and width"),
        ({"negative_prompt": ["x", "y"]}, "2 texts in negative_prompt for 1 layouts"),
    ],
)
def test_bad_arguments_of_generate_are_named(
    sd_pipe: StableDiffusionPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(sd_pipe, **{"layout": "a", **options})


def test_schedulers_with_noise_of_their_own_are_refused(sd_pipe: StableDiffusionPipeline) -> None:
    # The real one needs torchsde only once it steps; building it may need it, too.
    sd_pipe.scheduler = DPMSolverSDEScheduler.__new__(DPMSolverSDEScheduler)
    with pytest.raises(ValueError, match="DPMSolverSDEScheduler samples noise that the seeds cannot set"):
        generate(sd_pipe, "a")


def test_an_image_of_nan_is_refused_by_its_seed(sd_pipe: StableDiffusionPipeline, sdxl_pipe: DiffusionPipeline) -> None:
    """One of a batch, as numbers too; never a black image."""
    for pipe in (sd_pipe, sdxl_pipe):
        for asked in ("pil", "np", "pt", "latent"):
            bad = initial_noise(pipe, 7, 64, 64)

            def spoil(module: Any, args: Any, result: Any, bad: Tensor = bad) -> Any:
                rows = [i for i, row in enumerate(args[0]) if torch.equal(row, bad[0])]
                result[0][rows] = torch.nan
                return result

            pipe.set_progress_bar_config(disable=True)
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
            hook = pipe.unet.register_forward_hook(spoil)
            with pytest.raises(ValueError, match="image with seed 7 of the prompt 'a cat' holds NaN"):
                generate(pipe, "a cat", seeds=[5, 7], num_inference_steps=1, output_type=asked)
            good = generate(pipe, "a cat", seeds=[5, 6], num_inference_steps=1, output_type=asked)
            hook.remove()
            assert len(good.images) == 2


def test_images_are_those_of_the_pipeline(sd_pipe: StableDiffusionPipeline) -> None:
    layout = Layout("a cat", 64, 64)
    ours = generate(sd_pipe, layout, seeds=3, num_inference_steps=2).images[0]
    plain = sd_pipe(
        "a cat", latents=initial_noise(sd_pipe, 3, 64, 64), height=64, width=64, num_inference_steps=2
    ).images[0]
    assert type(ours) is type(plain) and ours.mode == plain.mode
    assert np.array_equal(np.asarray(ours), np.asarray(plain))
