"""The transformer of the embedded base: flow matching, attention and text, and a training that exports a pipeline."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors.torch import load_file
from tolerances import rounding
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

import research.micro_base.transformer
from localctl.bases import MICRO_WEIGHTS
from localctl.pipelines import load_pipeline
from research.harness import first_scenes
from research.micro_base import measure
from research.micro_base.__main__ import main
from research.micro_base.clock import ClockConfig
from research.micro_base.flow import FLOW_SHIFT, ZEROS, FlowLoss, JointAttention, Teacher, velocity
from research.micro_base.focus import Focus
from research.micro_base.loop import LoopConfig, read_weights
from research.micro_base.report import main as report
from research.micro_base.transformer import (
    WORDS,
    encoder,
    new_pipeline,
    new_transformer,
    patch_of,
    transformer_for,
    transformer_kind,
)
from research.micro_base.unet import new_scheduler, train_denoiser
from research.micro_base.unet_loss import LatentCache, Recipe, Sampled, Sampler, sample_flow, to

BLOCKS = research.micro_base.transformer.BLOCKS
SCENES, WIDTH = 12, 256
LAYERS = 40 * 9 * 160  # layers in a row, the longest sums of each
RECIPE = Recipe("flow")
TRANSFORMER = transformer_kind()


@pytest.fixture(scope="module", autouse=True)
def few_blocks() -> Iterator[None]:
    """Let new transformers have three blocks, for short tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(research.micro_base.transformer, "BLOCKS", 3)
        yield


@pytest.fixture(scope="module")
def transformer(few_blocks):
    """Return a transformer whose blocks act, as a new one's do not yet."""
    torch.manual_seed(0)
    transformer = new_transformer()
    for parameter in transformer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return transformer.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pipe(transformer):
    vae = AutoencoderKL.from_pretrained(MICRO_WEIGHTS / "vae", dtype=torch.float32)
    clip = CLIPModel.from_pretrained(MICRO_WEIGHTS / "clip", dtype=torch.float32)
    return new_pipeline(vae, clip, CLIPTokenizer.from_pretrained(MICRO_WEIGHTS / "tokenizer"), transformer)


@pytest.fixture
def cache() -> LatentCache:
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(SCENES, 4, 16, 16, generator=random).half()
    states = (3 + 5 * torch.randn(3, WORDS + 1, WIDTH, generator=random)).half()
    return LatentCache(latents, states, torch.tensor([1, 9, 12]), torch.arange(SCENES) % 2 + 1)


@pytest.fixture
def focus() -> Focus:
    masks = torch.zeros(SCENES, 3, 16, 16)
    masks[:, 0, 4:9, 4:9] = 1
    tokens = torch.tensor([[2, -1, -1]]).expand(SCENES, -1)
    odds = torch.full((SCENES,), 1 / SCENES, dtype=torch.float64)
    return Focus(masks.half(), masks.amax(1).half(), tokens, torch.full((SCENES,), -1), odds, torch.zeros(0))


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    noisy = torch.randn(rows, 4, 16, 16, generator=random)
    return noisy, 1000 * torch.rand(rows, generator=random), torch.randn(rows, WORDS + 1, WIDTH, generator=random)


@torch.no_grad()
def test_one_weighted_token_is_as_many_tokens_of_zeros_as_the_stock_pipeline_appends(transformer) -> None:
    noisy, t, states = inputs(4)
    with JointAttention(WORDS, None):
        weighted = velocity(transformer, noisy, t, states)
    for row in (0, 1, 3):
        words = torch.cat([states[:, :-1], torch.zeros(len(states), ZEROS[row], WIDTH)], 1)
        one = slice(row, row + 1)
        stock = transformer(noisy[one], words[one], states[one, -1], t[one]).sample
        assert torch.allclose(weighted[one], stock, rtol=0, atol=float(stock.abs().max()) * rounding(LAYERS))
    none = transformer(noisy[:1], states[:1, :-1], states[:1, -1], t[:1]).sample
    assert not torch.allclose(weighted[:1], none, atol=0.01), "their number matters before a training"


@torch.no_grad()
def test_the_recorded_attention_is_that_of_the_image_among_the_words(transformer) -> None:
    kept: dict[str, torch.Tensor] = {}
    layer = transformer.transformer_blocks[2].attn
    hooks = [
        part.register_forward_hook(lambda module, args, output, name=name: kept.__setitem__(name, output))
        for name, part in (("query", layer.norm_q), ("key", layer.norm_added_k))
    ]
    recorded: list[torch.Tensor] = []
    try:
        with JointAttention(WORDS, recorded):
            velocity(transformer, *inputs(2))
    finally:
        for hook in hooks:
            hook.remove()
    assert [attention.shape for attention in recorded] == [(2, 256, WORDS)] * len(transformer.transformer_blocks)
    scores = kept["query"] @ kept["key"][:, :, :WORDS].transpose(2, 3) / kept["query"].shape[-1] ** 0.5
    assert torch.allclose(recorded[2], scores.softmax(-1).mean(1), atol=1e-6)


def test_noise_levels_are_those_of_the_schedulers_steps(transformer, cache: LatentCache) -> None:
    """Half of them lie beyond sigma 0.75: logit-normal, and then shifted by 3."""
    t = sample_flow(1000, np.random.default_rng(0))
    sigmas = FlowLoss(transformer, cache, None).sigmas
    scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
    assert torch.allclose(sigmas.flip(0), scheduler.sigmas, atol=1e-6)
    assert float(sigmas[t].median()) == pytest.approx(0.75, abs=0.002)
    assert (np.diff(np.sort(t)) <= 40).all(), "one in each stratum, to the ends"


def test_the_scheduler_integrates_the_target_to_the_clean_latents(transformer, cache: LatentCache) -> None:
    sampled = Sampler(cache.latents.shape, None, 3, RECIPE, 0, torch.device("cpu"))(np.random.default_rng(0))
    latents = cache.latents[sampled.scenes].float()
    noisy: list[torch.Tensor] = []
    loss = FlowLoss(transformer, cache, None)
    hook = transformer.register_forward_pre_hook(lambda module, args: noisy.append(args[0]))
    try:
        output, target, weight = loss.predict(latents, sampled, cache.states[:3].float())
    finally:
        hook.remove()
    assert output.shape == target.shape and torch.equal(weight, torch.ones(3))
    for row, t in enumerate(sampled.timesteps.tolist()):
        scheduler = FlowMatchEulerDiscreteScheduler()  # no shift: the sigma is given
        scheduler.set_timesteps(sigmas=[float(loss.sigmas[t])])
        clean = scheduler.step(target[row], scheduler.timesteps[0], noisy[0][row]).prev_sample
        assert torch.allclose(clean, latents[row], atol=1e-5)


class OneScene(nn.Module):
    """A U-Net of the v that is right if there is but one image, ``clean``."""

    def __init__(self, clean: torch.Tensor, alphas: torch.Tensor) -> None:
        super().__init__()
        self.clean, self.ratios, self.dtype = clean, ((1 - alphas) / alphas).sqrt(), torch.float32

    def forward(self, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> UNet2DConditionOutput:
        below = t.long().clamp(max=len(self.ratios) - 2)
        ratio = torch.lerp(self.ratios[below], self.ratios[below + 1], t - below)[:, None, None, None]
        signal = (1 + ratio**2) ** -0.5
        noise = ratio * signal
        return UNet2DConditionOutput(sample=signal * (x - signal * self.clean) / noise - noise * self.clean)


def test_a_teacher_of_another_schedule_gives_the_velocity(transformer, cache: LatentCache) -> None:
    alphas = new_scheduler().alphas_cumprod
    sampled = Sampler(cache.latents.shape, None, 8, RECIPE, 0, torch.device("cpu"))(np.random.default_rng(0))
    within = replace(sampled, timesteps=sampled.timesteps.clamp(5, 980))  # its schedule ends at sigma 0.01 and 0.9937
    clean = cache.latents[5].float()
    taught = FlowLoss(transformer, cache, None, Teacher(OneScene(clean, alphas), cache, alphas))
    _, target, _ = taught.predict(clean.expand(8, -1, -1, -1), within, cache.states[:1].float().expand(8, -1, -1))
    assert torch.allclose(target, sampled.noise - clean, atol=1e-3)


def test_the_loss_stays_on_one_device_and_reads_no_value_back(cache: LatentCache, focus: Focus) -> None:
    """Tensors without values stand for those of a GPU, where both would break a graph."""
    device = torch.device("meta")
    transformer = new_transformer().to(device).to(torch.bfloat16)
    loss = FlowLoss(transformer, to(cache, device), to(focus, device))
    sampled: Sampled = Sampler(cache.latents.shape, None, 4, RECIPE, 0, torch.device("cpu"))(np.random.default_rng(0))
    terms = loss(to(sampled, device))
    terms["loss"].backward()
    assert {term.device for term in terms.values()} == {device}
    silent = {name for name, parameter in transformer.named_parameters() if parameter.grad is None}
    assert not silent


def test_tokens_may_be_patches(tmp_path: Path, cache: LatentCache, focus: Focus) -> None:
    config = LoopConfig(steps=1, learning_rate=1e-3)
    model, _ = train_denoiser(transformer_kind(2), cache, config, tmp_path, 4, RECIPE, focus=focus)
    assert model.config.patch_size == patch_of(read_weights(tmp_path / "transformer.pt")) == 2
    assert velocity(model, *inputs(2)).shape == (2, 4, 16, 16)


@torch.no_grad()
def test_a_new_transformer_changes_nothing_and_standardises_its_text(cache: LatentCache) -> None:
    transformer = transformer_for(cache)
    assert not velocity(transformer, *inputs(2)).any()
    plain = new_transformer().context_embedder
    text = cache.states[:, :-1].float().flatten(0, 1)
    plain.weight.copy_(transformer.context_embedder.weight * text.std(0))
    plain.bias.copy_(transformer.context_embedder.bias + transformer.context_embedder.weight @ text.mean(0))
    expected = plain((text - text.mean(0)) / text.std(0))
    assert torch.allclose(transformer.context_embedder(text), expected, atol=1e-4)


def test_the_text_of_the_training_is_that_of_the_stock_pipeline(pipe) -> None:
    caption = "a red circle left of a blue star"
    states, _, pooled, _ = pipe.encode_prompt(caption, None, None)
    own = encoder(pipe)([caption])
    assert states.shape == (1, WORDS + 256, WIDTH) and not states[:, WORDS:].any()
    assert torch.equal(own[:, :WORDS], states[:, :WORDS]) and torch.equal(own[:, WORDS], pooled)
    again = encoder(pipe)(["a red star left of a blue circle"])
    half = WIDTH // 2
    assert torch.equal(again[:, 2, half:], own[:, 2, half:]), "the second encoder has the words alone"
    assert not torch.equal(again[:, 8, :half], own[:, 8, :half]), "the first one, words in their context"


def test_the_attention_on_padding_is_a_share(pipe) -> None:
    share = measure.padding_mass(pipe, ["a red circle", "a blue star on a black background"])
    assert 0.3 < share < 0.95  # 28 and 23 of 32 tokens, and attention without training


def test_a_transformer_learns_and_resumes_exactly(tmp_path: Path, cache: LatentCache, focus: Focus) -> None:
    settings = {"learning_rate": 1e-3, "ema": 0.9, "warmup": 2}
    straight, done = train_denoiser(
        TRANSFORMER, cache, LoopConfig(steps=3, **settings), tmp_path, 4, RECIPE, None, focus
    )
    assert done
    stopped = LoopConfig(steps=3, minutes=1e-9, **settings)  # a step in each call
    for _ in range(3):
        resumed, done = train_denoiser(TRANSFORMER, cache, stopped, tmp_path / "stopped", 4, RECIPE, None, focus)
    assert done
    states = (straight.state_dict(), resumed.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    start = transformer_for(cache).proj_out.weight
    assert not torch.equal(states[0]["proj_out.weight"], start)


def test_a_training_by_steps_computes_in_bfloat16(tmp_path: Path, cache: LatentCache, focus: Focus) -> None:
    config = LoopConfig(steps=1, learning_rate=1e-3, warmup=1)
    weights = []
    for bf16 in (False, True):
        folder = tmp_path / str(bf16)
        model, _ = train_denoiser(TRANSFORMER, cache, config, folder, 4, RECIPE, focus=focus, bf16=bf16)
        weights.append(model.proj_out.weight)
    assert weights[1].dtype == torch.float32 and weights[1].isfinite().all()
    assert not torch.equal(*weights) and torch.allclose(*weights, atol=2.1e-3)  # an update of Adam moves by the rate


def test_a_transformer_is_trained_by_the_clock_in_bfloat16(tmp_path: Path, cache: LatentCache, focus: Focus) -> None:
    config = ClockConfig(seconds=0.5, learning_rate=1e-3, ema=0.5)
    model, _ = train_denoiser(TRANSFORMER, cache, config, tmp_path, 4, RECIPE, focus=focus, bf16=True)
    half, whole = load_file(tmp_path / "transformer.safetensors"), read_weights(tmp_path / "transformer.pt")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and value.isfinite().all()
        assert torch.equal(half[name], value.half()) and torch.equal(whole[name], value)
    assert json.loads((tmp_path / "transformer.jsonl").read_text().splitlines()[0])["step"] == 1


def test_a_stock_pipeline_is_trained_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(research.micro_base.transformer, "BLOCKS", BLOCKS)
    base = tmp_path / "base"
    flags = ["--denoiser", "transformer", "--workdir", str(tmp_path), "--scenes", "8", "--unet_scenes", "8"]
    flags += ["--unet_steps", "2", "--unet_batch", "2", "--output_dir", str(base), "--parts", "unet", "export"]
    assert main([*flags, "--continue_from", str(MICRO_WEIGHTS), "--teacher", str(MICRO_WEIGHTS)]) == 0
    assert sum(file.stat().st_size for file in base.rglob("*")) < 20e6
    pipe = load_pipeline(str(base))
    assert type(pipe) is StableDiffusion3Pipeline and pipe.text_encoder_3 is None
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (128, 128)
    monkeypatch.setattr(measure, "STEPS", 1)
    (found,) = measure.generate_captions(pipe, first_scenes(1, lambda item: True))
    assert found.shape == (128, 128, 3)
    trained = read_weights(tmp_path / "transformer.pt")
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, trained[name].half().float())
    assert main([*flags, "--continue_from", str(MICRO_WEIGHTS), "--patch", "2"]) == 2
    assert "--patch 2 is not that of the weights to start from; give 1." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "flags", "sentence"),
    [
        (main, ["--denoiser", "transformer"], "give --output_dir"),
        (main, ["--teacher", str(MICRO_WEIGHTS)], "--teacher does not act on --denoiser unet"),
        (main, ["--denoiser", "transformer", "--output_dir", "x", "--unet_noisy", "0.3"], "does not act on --denoiser"),
        (main, ["--denoiser", "transformer", "--output_dir", "x", "--teacher", "nowhere"], "no folder nowhere/unet"),
        (report, ["--guidance_scale", "3"], "add --images_only"),
        (report, ["--base", "nowhere"], "There is no CLIP"),
    ],
)
def test_flags_that_do_not_fit_are_one_sentence(program, flags, sentence, capsys) -> None:
    assert program(flags) == 2
    assert sentence in capsys.readouterr().err
