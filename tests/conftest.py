"""Tiny but real pipelines of the supported kinds, built from configs with fixed seeds: no network, no downloads."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from pipeline_copies import Copies
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from localctl.adapter import LocalAdapter
from localctl.pipelines import choose_pil_processors

TEXT_WIDTH = 16
CHANNELS = (8, 16, 16, 24)  # of the tiny Stable Diffusion 1.5: differing, so that a mixed-up level shows
XL_CHANNELS = (8, 16, 16)


def pytest_collection_finish() -> None:
    """Keep what was imported out of the searches for garbage, which take a tenth of the time otherwise."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_configure() -> None:
    """One thread, from before the first picture: tests fork processes, which cannot use the pools of threads of their
    parent, and runs that are to be equal bit for bit must sum in the same order. Nothing waits for the disk, which
    matters for a power cut alone."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    os.fsync = lambda fd: None
    choose_pil_processors()  # pipelines are not to be imported before it


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Again, after tests that chose otherwise: before the next module's fixtures are made."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_handlers_left() -> Iterator[None]:
    """Remove what :func:`logged` added, after each test."""
    yield
    from log_helpers import forget_handlers  # here, so that scripts can import this file without pytest's paths

    forget_handlers()


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with single characters for vocabulary."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789,.-"
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def tiny_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_vae() -> AutoencoderKL:
    channels = (4, 4, 8, 8)  # four levels: shrinks by 8
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=64,
    )


def tiny_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def tiny_sd(prediction_type: str = "epsilon") -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1.x (epsilon) or 2.1 (v) in small: 64x64 pixels, 8x8 latents."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        sample_size=8,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=tiny_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipe)


def tiny_sdxl() -> diffusers.StableDiffusionXLPipeline:
    """Stable Diffusion XL in small: two text encoders, no attention on the finest level; 64x64 pixels."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        block_out_channels=XL_CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=2 * TEXT_WIDTH,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
        norm_num_groups=4,
        sample_size=8,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=tiny_scheduler(),
        add_watermarker=False,
    )
    return _quiet(pipe)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if module is not None:
            module.eval().requires_grad_(False)
    return pipe


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """Ray on this machine, started once for all tests of a process; what connects meanwhile uses it."""
    from localctl.cluster import connected  # slow to import

    with connected(cpus=4):
        yield


@pytest.fixture(scope="session")
def _sd_session() -> Copies:
    return Copies(tiny_sd())


@pytest.fixture(scope="session")
def _v_session() -> Copies:
    return Copies(tiny_sd("v_prediction"))


@pytest.fixture(scope="session")
def _sdxl_session() -> Copies:
    return Copies(tiny_sdxl())


@pytest.fixture
def sd_pipe(_sd_session: Copies) -> diffusers.StableDiffusionPipeline:
    """A tiny Stable Diffusion 1.5, the test's own to change."""
    return _sd_session.copy()


@pytest.fixture
def v_pipe(_v_session: Copies) -> diffusers.StableDiffusionPipeline:
    """As ``sd_pipe``, with v-prediction."""
    return _v_session.copy()


@pytest.fixture
def sdxl_pipe(_sdxl_session: Copies) -> diffusers.StableDiffusionXLPipeline:
    """A tiny Stable Diffusion XL, the test's own to change."""
    return _sdxl_session.copy()


def _saved(pipe: Any, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd_folder(_sd_session: Copies, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion 1.5 as a diffusers folder; not to be written to."""
    return _saved(_sd_session.pipe, tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def v_folder(_v_session: Copies, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny v-prediction pipeline as a diffusers folder; not to be written to."""
    return _saved(_v_session.pipe, tmp_path_factory.mktemp("v"))


@pytest.fixture(scope="session")
def sdxl_folder(_sdxl_session: Copies, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion XL as a diffusers folder; not to be written to."""
    return _saved(_sdxl_session.pipe, tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def base_here(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: empty but for the tiny base, by the name ``base``."""
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(sd_folder)
    return tmp_path


@pytest.fixture
def assert_refused_early(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str], str], None]:
    """That ``sample.py`` with these flags says one sentence and loads no base: see ``sample_helpers.refused_early``."""
    from sample_helpers import refused_early  # slow to import

    return functools.partial(refused_early, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def make_adapter() -> Callable[..., LocalAdapter]:
    """Make a random LocalAdapter that fits ``sd_pipe``, strong enough to show: ``make_adapter(seed=0, **config)``."""

    def make(seed: int = 0, **config: Any) -> LocalAdapter:
        torch.manual_seed(seed)
        options = {"in_channels": 1, "channels": list(CHANNELS), "num_res_blocks": 1, **config}
        adapter = LocalAdapter(**options).eval().requires_grad_(False)
        for parameter in adapter.parameters():
            parameter.mul_(2)
        return adapter

    return make


@pytest.fixture
def xl_adapter() -> LocalAdapter:
    """A random LocalAdapter that fits ``sdxl_pipe``."""
    torch.manual_seed(0)
    adapter = LocalAdapter(
        in_channels=1,
        channels=[*XL_CHANNELS, XL_CHANNELS[-1]],
        num_res_blocks=1,
        downscale_factor=16,
        adapter_type="full_adapter_xl",
    )
    return adapter.eval().requires_grad_(False)
