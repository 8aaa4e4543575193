"""Tiny random models of each family of transformers, of the real classes, loaded by ``from_pretrained`` from a folder.

A family is one entry of ``FAMILIES``: a function that builds its pipeline, and what differs between families.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_transformers import tiny
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.denoisers import denoiser_of

SIDE = 32  # pixels of the images; 4 latents, 2 tokens
PROMPT = "A Cat, dogs"


Projections = Callable[[Any, Any, Any], tuple[Tensor, Tensor, Tensor, slice, Tensor]]


@dataclass(frozen=True)
class Family:
    """A family with a tiny pipeline.

    projections: of an attention layer and its arguments, what its row of the prompt attends with, (H, *, d):
    queries of the image, all keys and values, the place of the text, and a bias (S,) of its own. embeds: of a
    prompt, a prompt for pooled embeddings and a negative prompt, the arguments that pass them as embeddings.
    image_at: the place of the image in what an attention layer returns. call: arguments of every call; guided,
    plain: those of calls with guidance, and without. image_to_image: whether diffusers has such a pipeline. calls:
    of the module in a step with guidance, that with the prompt first. row: of those of a call with guidance, that
    of the prompt. negative: whether calls take a negative prompt.
    """

    name: str
    projections: Projections
    embeds: Callable[[Any, str, str, str], dict[str, Any]]
    image_at: int | None = None
    call: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 4.0})
    plain: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    image_to_image: bool = False
    calls: int = 1
    row: int = -1
    negative: bool = True

    def image_input(self, args: Any, kwargs: Any) -> Tensor:
        """Return the image's tokens (R, Q, C) among the inputs of a block."""
        return args[0] if args else kwargs["hidden_states"]

    def image_of(self, output: Any) -> Tensor:
        """Return the image's part (R, Q, C) of what an attention layer returns."""
        return output if self.image_at is None else output[self.image_at]

    def output(self, attn: Any, core: Tensor) -> Tensor:
        """Return what a layer makes of the heads' results (Q, C)."""
        return attn.to_out[0](core)


def heads(attn: Any, states: Tensor, layers: Any, row: int = -1) -> list[Tensor]:
    """Return (H, S, d) of a row, for each of the layers, which may be a pair with a norm."""
    found = []
    for layer, norm in layers:
        one = layer(states[row]).unflatten(-1, (attn.heads, -1)).transpose(0, 1)
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


def flux_projections(attn: Any, args: Any, kwargs: Any) -> Any:
    image, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
    own = heads(attn, image, [(attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)])
    more = [(attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k), (attn.add_v_proj, None)]
    query, key, value = (torch.cat(pair, dim=1) for pair in zip(heads(attn, text, more), own, strict=True))
    cos, sin = kwargs["image_rotary_emb"]
    count = text.shape[1]
    return rotated(query, cos, sin)[:, count:], rotated(key, cos, sin), value, slice(0, count), torch.zeros(len(cos))


def qwen_projections(attn: Any, args: Any, kwargs: Any) -> Any:
    image, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
    own = heads(attn, image, [(attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)])
    more = [(attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k), (attn.add_v_proj, None)]
    query, key, value = (torch.cat(pair, dim=1) for pair in zip(heads(attn, text, more), own, strict=True))
    turn = torch.cat(kwargs["image_rotary_emb"][::-1]).repeat_interleave(2, dim=-1)
    turned = [rotated(one, turn.real, turn.imag) for one in (query, key)]
    count, mask = text.shape[1], kwargs["encoder_hidden_states_mask"]
    return turned[0][:, count:], turned[1], value, slice(0, count), as_bias(mask, len(turn))


def z_projections(attn: Any, args: Any, kwargs: Any) -> Any:
    layers = [(attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)]
    query, key, value = heads(attn, args[0], layers, 0)
    turn = kwargs["freqs_cis"][0].repeat_interleave(2, dim=-1)
    turned = [rotated(one, turn.real, turn.imag) for one in (query, key)]
    return turned[0][:, :4], turned[1], value, slice(32, len(turn)), as_bias(kwargs["attention_mask"], len(turn))


def as_bias(mask: Tensor | None, length: int) -> Tensor:
    """Return the bias (S,) that hides what a mask of the first row hides; an image's part has none."""
    bias = torch.zeros(length)
    if mask is not None:
        bias[: mask.shape[1]][~mask[0].bool()] = -torch.inf
    return bias


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels of ``states`` (H, S, d) by angles whose cosine and sine are (S, d)."""
    turned = torch.stack([-states[..., 1::2], states[..., ::2]], dim=-1).flatten(-2)
    return states * cos + turned * sin


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


def flux_embeds(pipe: Any, prompt: str, pooled: str, negative: str) -> dict[str, Any]:
    found: dict[str, Any] = {"negative_prompt": None}
    for prefix, text, other in (("", prompt, pooled), ("negative_", negative, "")):
        found[f"{prefix}prompt_embeds"] = pipe.encode_prompt(text, None, max_sequence_length=24)[0]
        found[f"{prefix}pooled_prompt_embeds"] = pipe.encode_prompt(other, None, max_sequence_length=24)[1]
    return found


def flux2_embeds(pipe: Any, prompt: str, pooled: str, negative: str) -> dict[str, Any]:
    names = ("prompt_embeds", "negative_prompt_embeds")
    texts = zip(names, (prompt, negative), strict=True)
    return {name: pipe.encode_prompt(text, max_sequence_length=48)[0] for name, text in texts}


def qwen_embeds(pipe: Any, prompt: str, pooled: str, negative: str) -> dict[str, Any]:
    text, mask = pipe.encode_prompt(prompt)
    other, other_mask = pipe.encode_prompt(negative)
    return {
        "prompt_embeds": text,
        "prompt_embeds_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": other,
        "negative_prompt_embeds_mask": other_mask,
    }


def z_embeds(pipe: Any, prompt: str, pooled: str, negative: str) -> dict[str, Any]:
    text, other = pipe.encode_prompt(prompt, negative_prompt=negative)
    return {"prompt_embeds": text, "negative_prompt_embeds": other}


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "pixart",
            cross_projections,
            pixart_embeds,
            call={"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 24},
        ),
        Family("sd3", sd3_projections, sd3_embeds, 0, {"max_sequence_length": 24}, image_to_image=True),
        Family(
            "flux",
            flux_projections,
            flux_embeds,
            0,
            {"max_sequence_length": 24},
            guided={"guidance_scale": 3.5, "true_cfg_scale": 4.0, "negative_prompt": ""},
            plain={"guidance_scale": 3.5},
            image_to_image=True,
            calls=2,
        ),
        Family(
            "flux2",
            flux_projections,
            flux2_embeds,
            0,
            {"max_sequence_length": 48},
            calls=2,
            negative=False,
        ),
        Family(
            "qwen_image",
            qwen_projections,
            qwen_embeds,
            0,
            guided={"true_cfg_scale": 4.0, "negative_prompt": ""},
            plain={},
            image_to_image=True,
            calls=2,
        ),
        Family(
            "z_image",
            z_projections,
            z_embeds,
            call={"max_sequence_length": 48},
            guided={"guidance_scale": 3.0},
            plain={"guidance_scale": 0.0},
            image_to_image=True,
            row=0,
        ),
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
            pipe: Any = tiny(name)
            with torch.no_grad():
                for parameter in pipe.transformer.parameters():
                    if parameter.ndim > 1:  # large enough that attention differs between cells
                        spread = 1.5 / parameter[0].numel() ** 0.5
                        parameter.copy_(spread * torch.randn_like(parameter))
                last = getattr(pipe.transformer, "proj_out", None) or pipe.transformer.all_final_layer["2-1"].linear
                last.weight *= 0.2  # but the latents stay of order 1
            pipe.save_pretrained(made[name])
        return made[name]

    return folder


# Whole proofs of these are slow tests; what is theirs alone is tested each time, in test_dispatched_families.
_SLOW = ("flux", "flux2", "qwen_image")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in _SLOW else name for name in FAMILIES])
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


def run(family: Family, pipe: Any, prompt: Any = PROMPT, count: int = 1, guided: bool = True, **options: Any) -> Tensor:
    """Return the latents after two steps from fixed noise."""
    size = options.get("height", SIDE), options.get("width", SIDE)
    given = {
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": 2,
        "output_type": "latent",
        "latents": latents_of(pipe, count, size),
    }
    guidance = family.guided if guided else family.plain
    if isinstance(prompt, list) and "negative_prompt" in guidance:  # such pipelines need one for each
        guidance = {**guidance, "negative_prompt": [guidance["negative_prompt"]] * len(prompt)}
    arguments = {**given, **family.call, **guidance, **options}
    if not family.negative:
        arguments.pop("negative_prompt", None)
    prompt = list(prompt) if isinstance(prompt, list) else prompt  # Z-Image's pipeline changes it
    return pipe(prompt=prompt, **arguments).images
