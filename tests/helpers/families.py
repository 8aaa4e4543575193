"""Tiny random models of each family of transformers, of the real classes, loaded by ``from_pretrained`` from a folder.

A family is one entry of ``FAMILIES``: a function that builds its pipeline, and what differs between families.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import TEXT_WIDTH, tiny_scheduler, tiny_text_config, tiny_tokenizer, tiny_vae
from diffusers import DiffusionPipeline
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5TokenizerFast

from localctl.adapter import LocalAdapter
from localctl.denoisers import denoiser_of

SIDE = 32  # pixels of the images; 4 latents, 2 tokens
PROMPT = "A Cat, dogs"


Projections = Callable[[Any, Any, Any], tuple[Tensor, Tensor, Tensor, slice, Tensor]]


@dataclass(frozen=True)
class Family:
    """A family with a tiny pipeline.

    build: makes it. projections: of an attention layer and its arguments, what its last row attends with, (H, *, d):
    queries of the image, all keys and values, the place of the text, and a bias (S,) of its own. embeds: of a prompt, a
    prompt for pooled embeddings and a negative prompt, the arguments that pass them as embeddings. image_at: the place
    of the image in what an attention layer returns. call: arguments of every call. image_to_image: whether diffusers
    has such a pipeline.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    projections: Projections
    embeds: Callable[[Any, str, str, str], dict[str, Any]]
    image_at: int | None = None
    call: dict[str, Any] = field(default_factory=dict)
    image_to_image: bool = False

    def image_input(self, args: Any, kwargs: Any) -> Tensor:
        """Return the image's tokens (R, Q, C) among the inputs of a block."""
        return args[0] if args else kwargs["hidden_states"]

    def image_of(self, output: Any) -> Tensor:
        """Return the image's part (R, Q, C) of what an attention layer returns."""
        return output if self.image_at is None else output[self.image_at]

    def output(self, attn: Any, core: Tensor) -> Tensor:
        """Return what a layer makes of the heads' results (Q, C)."""
        return attn.to_out[0](core)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's fast tokenizer in small: single characters and some words, an end token and no start token."""
    words = ["▁", "▁a", "▁cat", "▁dog", "s", ",", "▁dogs", *(chr(code) for code in range(97, 123)), "."]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -float(len(words))) for word in words)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def tiny_t5(vocabulary: int, width: int = TEXT_WIDTH) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def pixart() -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
        sample_size=4,
        patch_size=2,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(tiny_scheduler().config)
    return diffusers.PixArtSigmaPipeline(tokenizer, tiny_t5(len(tokenizer)), tiny_vae(), transformer, scheduler)


def sd3(**options: Any) -> DiffusionPipeline:
    first, second, third = tiny_tokenizer(), tiny_tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **options,
    )
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(tiny_text_config(first)),
        tokenizer=first,
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(second)),
        tokenizer_2=second,
        text_encoder_3=tiny_t5(len(third), 2 * TEXT_WIDTH),
        tokenizer_3=third,
    )


def heads(attn: Any, states: Tensor, layers: Any) -> list[Tensor]:
    """Return (H, S, d) of the last row, for each of the layers, which may be a pair with a norm."""
    found = []
    for layer, norm in layers:
        one = layer(states[-1]).unflatten(-1, (attn.heads, -1)).transpose(0, 1)
        found.append(one if norm is None else norm(one))
    return found


def cross_projections(attn: Any, args: Any, kwargs: Any) -> Any:
    text = kwargs["encoder_hidden_states"]
    (query,) = heads(attn, args[0], [(attn.to_q, None)])
    key, value = heads(attn, text, [(attn.to_k, None), (attn.to_v, None)])
    return query, key, value, slice(0, text.shape[1]), kwargs["attention_mask"][-1, 0]


def sd3_projections(attn: Any, args: Any, kwargs: Any) -> Any:
    image, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
    own = heads(attn, image, [(attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)])
    more = [(attn.add_k_proj, attn.norm_added_k), (attn.add_v_proj, None)]
    key, value = (torch.cat(pair, dim=1) for pair in zip(own[1:], heads(attn, text, more), strict=True))
    count = image.shape[1]
    return own[0], key, value, slice(count, key.shape[1]), torch.zeros(key.shape[1])


def pixart_embeds(pipe: Any, prompt: str, pooled: str, negative: str) -> dict[str, Any]:
    text, mask, other, other_mask = pipe.encode_prompt(prompt, True, negative_prompt=negative, max_sequence_length=24)
    return {
        "prompt_embeds": text,
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": other,
        "negative_prompt_attention_mask": other_mask,
    }


def sd3_embeds(pipe: Any, prompt: str, pooled: str, negative: str) -> dict[str, Any]:
    texts = pipe.encode_prompt(prompt, None, None, negative_prompt=negative, max_sequence_length=24)
    of_call = pipe.encode_prompt(pooled, None, None, negative_prompt="", max_sequence_length=24)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, (*texts[:2], *of_call[2:]), strict=True))


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "pixart",
            pixart,
            cross_projections,
            pixart_embeds,
            call={"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 24},
        ),
        Family("sd3", sd3, sd3_projections, sd3_embeds, 0, {"max_sequence_length": 24}, image_to_image=True),
    )
}
_LOADED: dict[str, DiffusionPipeline] = {}


def frozen(pipe: Any) -> Any:
    """Return ``pipe`` without progress bars and gradients, its random weights large enough to show."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of each family's tiny pipeline; not to be written to."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(name)
            pipe = FAMILIES[name].build()
            with torch.no_grad():
                for parameter in pipe.transformer.parameters():
                    if parameter.ndim > 1:  # large enough that attention differs between cells
                        spread = 1.5 / parameter[0].numel() ** 0.5
                        parameter.copy_(spread * torch.randn_like(parameter))
                pipe.transformer.proj_out.weight *= 0.2  # but the latents stay of order 1
            pipe.save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def dit(family: Family, family_folders: Callable[[str], Path]) -> Any:
    """A tiny pipeline of the family, loaded from its folder; the test's own to change."""
    if family.name not in _LOADED:
        _LOADED[family.name] = frozen(DiffusionPipeline.from_pretrained(family_folders(family.name)))
    return copy.deepcopy(_LOADED[family.name])


def token_adapter(pipe: Any, levels: int = 2, seed: int = 0, width: int | None = None) -> LocalAdapter:
    """Make a random LocalAdapter for a family's tiny pipeline, strong enough to show."""
    torch.manual_seed(seed)
    own = denoiser_of(pipe).residual_shapes((4, 4))[0][0]
    adapter = LocalAdapter(
        in_channels=1,
        channels=[width or own] * levels,
        num_res_blocks=1,
        downscale_factor=SIDE // 2,
        adapter_type="token_adapter",
        token_width=8,
    )
    for layer in adapter.adapter.out:
        torch.nn.init.normal_(layer.weight)
    return adapter.eval().requires_grad_(False)


def latents_of(pipe: Any, count: int = 1, size: tuple[int, int] = (SIDE, SIDE), seed: int = 0) -> Tensor:
    """Noise as the pipeline takes it, of images of (H, W) pixels."""
    shape = denoiser_of(pipe).noise_shape(*size)
    return torch.randn(count, *shape[1:], generator=torch.Generator().manual_seed(seed))


def run(family: Family, pipe: Any, prompt: Any = PROMPT, count: int = 1, **options: Any) -> Tensor:
    """Return the latents after two steps from fixed noise, with guidance."""
    size = options.get("height", SIDE), options.get("width", SIDE)
    given = {
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": 2,
        "output_type": "latent",
        "guidance_scale": 4.0,
        "latents": latents_of(pipe, count, size),
    }
    return pipe(prompt, **{**given, **family.call, **options}).images
