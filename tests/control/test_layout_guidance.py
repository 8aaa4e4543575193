"""Layout guidance: the published energy, one step of it on two schedulers, per image, with an early exit."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, OTHER, PROMPT, assert_same_draw, draw, noise, processors
from control_helpers import bare_pipe, context, golden
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from tolerances import rounding
from torch import Tensor

from localctl.control.attach import attach
from localctl.control.attention_maps import AttentionMaps
from localctl.control.base import CallContext, EndOfRun
from localctl.control.dense import DenseModulation
from localctl.control.layout_guidance import BoundGuidance, EnergyReader, LayoutGuidance
from localctl.control.regions import BoundRegions
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout, Region

STRONG: dict[str, Any] = {"threshold": 0.0, "scale": 300.0, "end": 0.5, "iterations": 2}


def given(probabilities: Tensor) -> Any:
    """Return scores of one image with these probabilities (H,Q,K)."""
    logs = probabilities.log()[None]
    return SimpleNamespace(keys=logs.shape[-1], probabilities=lambda queries, bias: logs[:, :, queries].softmax(dim=-1))


def published_energy(chunk: int = 1000, **options: Any) -> Tensor:
    arrays = golden("layout_guidance")
    boxes = [tuple(arrays[f"boxes_object{index}"].tolist()) for index in range(2)]
    layout = Layout("a b c d e f", regions=(Region("a b", boxes[0]), Region("e", boxes[1])))
    maps = {"mid": ((4, 4), arrays["attn_mid"])}
    maps |= {f"up{index}": ((8, 8), part) for index, part in enumerate(arrays["attn_up"])}
    control = LayoutGuidance(**{"mask_resize": "floor", **options})
    bound = BoundGuidance(control, BoundRegions(bare_pipe(), [layout], control.mask_resize), tuple(maps))
    reader = EnergyReader(bound)
    where = context(layout_of_row=(0,), conditional=(True,))
    ended = False
    for name, (size, probabilities) in maps.items():
        layer = AttentionLayer(name, True, size)
        assert not ended and reader.attends(where, layer)
        try:
            for first in range(0, layer.cells, chunk):
                reader.read_attention(where, layer, given(probabilities), slice(first, first + chunk), None)
        except EndOfRun:
            ended = True
    assert ended == control.early_exit
    return reader.energy()


def test_published_energy() -> None:
    expected = golden("layout_guidance")["loss"][None]
    for options in ({}, {"chunk": 5}, {"early_exit": False}):
        torch.testing.assert_close(
            published_energy(**options), expected, rtol=rounding(64 + 77 + 20), atol=0
        )  # cells, tokens, heads
    assert (published_energy(mask_resize="cover") - expected).abs() > 1e-3


def test_a_token_that_nothing_attends_to_counts_no_more_than_its_weight() -> None:
    """Such a word has a share of 0 / 0 inside, whether it has a region or not."""
    layout = Layout("a b c d e f", regions=(Region("a b", (0.0, 0.0, 0.5, 0.5)),))
    bound = BoundGuidance(LayoutGuidance(), BoundRegions(bare_pipe(), [layout], "area"), ("mid",))
    where, layer = context(layout_of_row=(0,), conditional=(True,)), AttentionLayer("mid", True, (4, 4))
    energies = []
    for token in (5, 1):  # the words stand behind the first, special token
        block = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
        block[..., token] = -200.0  # whose exponential is 0
        block.requires_grad_()
        scores = SimpleNamespace(keys=8, probabilities=lambda queries, bias, given=block: given.softmax(dim=-1))
        reader = EnergyReader(bound)
        with pytest.raises(EndOfRun):
            reader.read_attention(where, layer, scores, slice(None), None)
        energies.append(reader.energy())
        assert torch.autograd.grad(energies[-1].sum(), block)[0].isfinite().all()
    assert 0.0 < energies[0].item() < energies[1].item() <= 1.0


def guided(pipe: Any, *controls: Any, layout: Any = LAYOUT, prompt: Any = PROMPT, **options: Any) -> Tensor:
    with attach(pipe, layout, list(controls)):
        return draw(pipe, prompt, **options)


class Watched(LayoutGuidance):
    """Record every shift."""

    def bind(self, pipe: Any, layouts: Any) -> Any:
        bound = super().bind(pipe, layouts)
        inner = bound.shift_latents
        object.__setattr__(self, "shifts", [])

        def shift_latents(where: CallContext, latents: Tensor, run: Any) -> Tensor | None:
            shift = inner(where, latents, run)
            self.shifts.append(torch.zeros_like(latents) if shift is None else shift)  # type: ignore[attr-defined]
            return shift

        bound.shift_latents = shift_latents  # type: ignore[method-assign]
        return bound


@pytest.mark.parametrize("kind", ["sd_pipe", "v_pipe", "sdxl_pipe"])
def test_the_energy_falls_and_attention_moves(kind: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(kind)
    before, after = AttentionMaps(), AttentionMaps()
    looked = guided(pipe, before)
    guide = Watched(**{**STRONG, "scale": 3000.0, "end": 1.0})
    moved = guided(pipe, guide, after)
    assert (moved - looked).abs().max() > 1e-3 and len(guide.shifts) == 2
    mean = [sum(maps.mass(0, region) for region in range(2)) / 2 for maps in (before, after)]
    assert mean[1] > mean[0] + 1e-4
    assert (
        len(after.recorder.records) == 1 and after.recorder.records[0].counts == before.recorder.records[0].counts
    )  # runs are not compared


@pytest.mark.parametrize("moves", [1, 3])
def test_one_step_agrees_on_ddim_and_euler(moves: int, sd_pipe: StableDiffusionPipeline) -> None:
    """The shifts are equal from the same latents at the same noise level, for one move and for several."""
    shifts = []
    for kind in (DDIMScheduler, EulerDiscreteScheduler):
        config = sd_pipe.scheduler.config
        sd_pipe.scheduler = kind.from_config(config, timestep_spacing="leading", steps_offset=1)
        guide = Watched(**{**STRONG, "iterations": moves, "end": 0.25})
        # The pipeline scales this for Euler, by what the scheduler then divides the U-Net's input by.
        guided(sd_pipe, guide, latents=noise(1), num_inference_steps=4)
        shifts.append(guide.shifts[0])
    assert shifts[0].abs().max() > 1e-3
    assert_same_draw(shifts[1], shifts[0], calls=2 * moves)  # there and back


def test_one_move_is_that_of_the_gradient(sd_pipe: StableDiffusionPipeline) -> None:
    """The shift is compared with finite differences of the energy along it, and has the factor (1 - abar) * scale."""
    guide = Watched(threshold=0.0, scale=50.0, iterations=1, end=0.1)
    energies: list[Tensor] = []
    points: list[Tensor] = []
    sigmas: list[float] = []

    class Probe(Watched):
        def bind(self, pipe: Any, layouts: Any) -> Any:
            bound = LayoutGuidance.bind(self, pipe, layouts)

            def shift_latents(where: CallContext, latents: Tensor, run: Any) -> None:
                if where.step:
                    return None
                sigmas.append(where.sigma)
                for factor in (-0.01, 0.01):
                    points.append(latents + factor * guide.shifts[0])
                    reader = EnergyReader(bound)
                    with run(points[-1], [0], reader):
                        energies.append(reader.energy().detach().double())
                return None

            bound.shift_latents = shift_latents  # type: ignore[method-assign]
            return bound

    guided(sd_pipe, guide)
    guided(sd_pipe, Probe())
    # shift = -scale (1 - abar) grad, so the slope along it is -|shift|^2 / (scale (1 - abar)).
    size = 50.0 * sigmas[0] ** 2 / (1 + sigmas[0] ** 2)
    slope = (energies[1] - energies[0]) / 0.02
    expected = -guide.shifts[0].double().square().sum() / size
    torch.testing.assert_close(slope[0], expected, rtol=0.02, atol=0)


def test_images_do_not_depend_on_their_batch(sd_pipe: StableDiffusionPipeline) -> None:
    """Each image has its own threshold and its own number of moves."""
    layouts = [LAYOUT, OTHER, Layout("x")]
    start = noise(3)
    options = {"negative_prompt": "a", "guidance_scale": 5.0}
    energies = []
    for row, layout in enumerate(layouts[:2]):
        guide = Watched(**{**STRONG, "iterations": 1})
        guided(sd_pipe, guide, layout=layout, prompt=layout.prompt, latents=start[row : row + 1], **options)
        energies.append(guide.shifts[0].abs().max())
    assert min(energies) > 1e-4
    guide = Watched(**STRONG)
    prompts = [layout.prompt for layout in layouts]
    negatives = {**options, "negative_prompt": ["a"] * 3}
    together = guided(sd_pipe, guide, layout=layouts, prompt=prompts, latents=start, **negatives)
    for row, layout in enumerate(layouts):
        alone = Watched(**STRONG)
        single = guided(sd_pipe, alone, layout=layout, prompt=prompts[row], latents=start[row : row + 1], **options)
        assert_same_draw(guide.shifts[0][row : row + 1], alone.shifts[0], calls=4)
        torch.testing.assert_close(together[row : row + 1], single, rtol=0, atol=1e-3)
    assert not guide.shifts[0][2].any()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("early_exit", [False, True])
def test_early_exit_and_checkpointing_change_nothing(
    early_exit: bool, checkpointing: bool, sd_pipe: StableDiffusionPipeline
) -> None:
    before = processors(sd_pipe)
    reference = Watched(**STRONG, early_exit=False)
    guided(sd_pipe, reference)
    ran: list[str] = []
    for name in ("mid_block", "up_blocks.3"):
        sd_pipe.unet.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    if checkpointing:
        sd_pipe.unet.enable_gradient_checkpointing()
    guide = Watched(**STRONG, early_exit=early_exit)
    dense = DenseModulation(w_cross=0.0, w_self=0.0, memory_limit=0.002)
    guided(sd_pipe, guide, dense)
    assert_same_draw(guide.shifts[0], reference.shifts[0], calls=4)  # two moves, there and back
    # One guided step of two moves, and two calls of the pipeline's own.
    assert ran.count("mid_block") == 4 and ran.count("up_blocks.3") == (2 if early_exit else 4)
    after = processors(sd_pipe)
    assert all(after[name] is before[name] for name in before)


def test_queries_in_parts_under_checkpointing(sd_pipe: StableDiffusionPipeline) -> None:
    sd_pipe.unet.enable_gradient_checkpointing()
    shifts = []
    for limit in (256.0, 0.002):
        guide = Watched(**STRONG)
        guided(sd_pipe, guide, DenseModulation(end=1.0, memory_limit=limit))
        shifts.append(guide.shifts[0])
    assert_same_draw(shifts[1], shifts[0], calls=4)


def test_weights_keep_their_gradients_switch_and_inference_mode_works(sd_pipe: StableDiffusionPipeline) -> None:
    expected = guided(sd_pipe, LayoutGuidance(**STRONG))
    sd_pipe.unet.requires_grad_(True)
    with torch.inference_mode():
        assert torch.equal(guided(sd_pipe, LayoutGuidance(**STRONG)), expected)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in sd_pipe.unet.parameters())


def test_a_gradient_that_is_no_number_skips_the_step_and_is_said(sd_pipe: StableDiffusionPipeline) -> None:
    plain = draw(sd_pipe, latents=noise(2), num_images_per_prompt=2)
    expected = guided(sd_pipe, LayoutGuidance(**STRONG), latents=noise(2), num_images_per_prompt=2)
    read = EnergyReader.energy

    def spoilt(self: EnergyReader) -> Tensor:
        energy = read(self)
        return energy if len(energy) == 1 else energy * torch.tensor([1.0, float("nan")])

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setattr(EnergyReader, "energy", spoilt)
        result = guided(sd_pipe, LayoutGuidance(**STRONG), latents=noise(2), num_images_per_prompt=2)
    assert ["image 1 of this batch" in str(item.message) for item in said if "guidance" in str(item.message)] == [True]
    torch.testing.assert_close(result[0], expected[0], rtol=0, atol=1e-3)
    assert_same_draw(result[1], plain[1])


def test_no_effect_is_bit_equal_to_plain(sd_pipe: StableDiffusionPipeline) -> None:
    plain = draw(sd_pipe)
    for options in ({"scale": 0.0}, {"iterations": 0}, {"threshold": 1.0}):
        assert torch.equal(guided(sd_pipe, LayoutGuidance(**{**STRONG, **options})), plain)
    assert torch.equal(guided(sd_pipe, LayoutGuidance(**STRONG), layout=Layout(PROMPT)), plain)


def test_sites_are_named_by_their_resolution(sd_pipe: Any, sdxl_pipe: Any) -> None:
    def names(pipe: Any, sites: Any) -> set[str]:
        bound = LayoutGuidance(sites=sites).bind(pipe, [LAYOUT])
        return {".".join(name.split(".")[:2]) for name in bound.layers}  # type: ignore[attr-defined]

    assert names(sd_pipe, None) == names(sd_pipe, ("mid/8", "up/4")) == {"mid_block.attentions", "up_blocks.1"}
    assert names(sdxl_pipe, None) == names(sdxl_pipe, ("mid/4", "up/4")) == {"mid_block.attentions", "up_blocks.0"}
    assert names(sd_pipe, ("down",)) == {f"down_blocks.{index}" for index in range(3)}
    with pytest.raises(ValueError, match="no cross-attention at 'up/8'; choose among down/1, .*mid/8, up/4"):
        names(sd_pipe, ("up/8",))
    with pytest.raises(ValueError, match="at least one attention layer"):
        names(sd_pipe, ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, "scale of LayoutGuidance must be at least 0"),
        ({"threshold": float("nan")}, "threshold of a control must be a finite number"),
        ({"iterations": 1.5}, "iterations of LayoutGuidance must be a whole number"),
        ({"start": 0.5, "end": 0.5}, "0 <= start < end"),
        ({"mask_resize": "round"}, "Unknown mask_resize 'round'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayoutGuidance(**options)


def test_an_image_that_reaches_the_threshold_is_moved_once_more_as_published(
    sd_pipe: StableDiffusionPipeline,
) -> None:
    options = {"scale": 3000.0, "threshold": 0.99, "end": 1.0}  # any energy is below
    for recheck in (True, False):
        guide = Watched(**options, recheck=recheck)
        guided(sd_pipe, guide, num_inference_steps=3)
        assert [bool(shift.any()) for shift in guide.shifts] == [not recheck, False, False]
