"""Settings that would disable controls are refused in one sentence, on attach or on call; all others work."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from attachment_helpers import LAYOUT, METHODS, PROMPT, draw, noise, processors
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from localctl.control.attach import attach
from localctl.control.attention_maps import AttentionMaps
from localctl.control.base import Control
from localctl.control.forward_guidance import ForwardGuidance
from localctl.control.layout_guidance import LayoutGuidance
from localctl.metrics.clip import Clip
from localctl.metrics.extractors import MICRO_CLIP
from localctl.weight_search.weights import optimize_weights

GUIDANCE = LayoutGuidance(end=1.0, threshold=0.0)


def assert_refused(pipe: Any, control: Control, message: str) -> None:
    """Check that attach refuses in one sentence and leaves nothing behind."""
    before, names = processors(pipe), set(vars(pipe))
    with pytest.raises(ValueError, match=message) as caught, attach(pipe, LAYOUT, control):
        pytest.fail("attached")
    assert "\n" not in str(caught.value)
    assert processors(pipe) == before and set(vars(pipe)) == names and not pipe.unet._forward_pre_hooks


class Quantised(nn.Linear):
    """A layer with integer weights, as quantisers store them; its output has no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.load_state_dict(linear.state_dict())
        self.requires_grad_(False)
        self.scale = float(self.weight.abs().max()) / 127

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            whole = (self.weight / self.scale).round().to(torch.int8)
            return nn.functional.linear(x, whole.to(x.dtype) * self.scale, self.bias)


def float8(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def half_stored(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def inference(pipe: Any) -> None:
    with torch.inference_mode():
        pipe.unet = copy.deepcopy(pipe.unet).requires_grad_(False)
        for module in pipe.unet.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)


def one_inference_layer(pipe: Any) -> None:
    with torch.inference_mode():
        norm = pipe.unet.mid_block.resnets[0].norm1
        norm.weight = nn.Parameter(norm.weight.clone(), requires_grad=False)


def quantised(pipe: Any) -> None:
    for module in list(pipe.unet.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and isinstance(module, Attention):
                setattr(module, name, Quantised(child))


KINDS = {f.__name__: f for f in (float8, half_stored, inference, one_inference_layer, quantised)}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_let_no_gradients_pass(kind: str, sd_pipe: StableDiffusionPipeline) -> None:
    KINDS[kind](sd_pipe)
    assert_refused(sd_pipe, GUIDANCE, r"LayoutGuidance needs gradients through the U-Net, .* such as RegionBias\.$")
    with pytest.raises(ValueError, match="An optimisation of weights needs gradients"):
        optimize_weights(sd_pipe, LAYOUT, Clip(MICRO_CLIP), num_inference_steps=2, progress=False)
    plain = draw(sd_pipe)
    for control in (*(make() for make in METHODS.values()), ForwardGuidance()):  # none of them needs any
        with attach(sd_pipe, LAYOUT, control):
            assert (draw(sd_pipe) - plain).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_do(dtype: torch.dtype, sd_pipe: StableDiffusionPipeline) -> None:
    from composition_helpers import with_lora

    pipe, _ = with_lora(sd_pipe)
    plain = draw(pipe)
    with attach(pipe, LAYOUT, GUIDANCE), torch.inference_mode():  # round the call, not round the loading
        assert (draw(pipe) - plain).abs().max() > 1e-3
    pipe.to(dtype)
    half = noise(1).to(dtype)
    plain = draw(pipe, latents=half)
    with attach(pipe, LAYOUT, GUIDANCE):
        assert (draw(pipe, latents=half) - plain).abs().max() > 1e-3


def test_casting_that_is_switched_on_later(sd_pipe: StableDiffusionPipeline) -> None:
    with attach(sd_pipe, LAYOUT, GUIDANCE):
        draw(sd_pipe)
        float8(sd_pipe)
        with pytest.raises(ValueError, match="needs gradients through the U-Net"):
            draw(sd_pipe)


def broadcast(pipe: Any) -> None:
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("blocks", "transformer"),
        cross_attention_block_identifiers=("blocks", "transformer"),
        current_timestep_callback=lambda: 500,
    )
    diffusers.apply_pyramid_attention_broadcast(pipe.unet, config)


def hooked_by(name: str) -> Callable[[Any], None]:
    """The hook of a cache on a block, as the cache's own function puts it there on the models that it knows."""
    module, kind = name.split(".")

    def put(pipe: Any) -> None:
        hooks = __import__(f"diffusers.hooks.{module}", fromlist=[kind])
        hook = getattr(hooks, kind).__new__(getattr(hooks, kind))
        ModelHook.__init__(hook)
        registry = HookRegistry.check_if_exists_or_initialize(pipe.unet.mid_block)
        registry.hooks[name] = hook

    put.__name__ = kind
    return put


def deep_cache(pipe: Any) -> None:
    """Like the package DeepCache: the forward methods of blocks are replaced."""
    block = pipe.unet.down_blocks[1]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)


def gated(pipe: Any) -> None:
    """Like T-GATE: the forward method of an attention layer returns its earlier output."""
    attn = next(m for m in pipe.unet.modules() if isinstance(m, Attention))
    own = attn.forward
    attn.forward = lambda *args, **kwargs: own(*args, **kwargs)


def merged(pipe: Any) -> None:
    """Like ToMe: a transformer block gets another class."""
    block = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0]
    own = type(block)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return own.forward(self, *args, **kwargs)

    block.__class__ = type("ToMeBlock", (own,), {"forward": forward})


CACHES: dict[str, Callable[[Any], None]] = {
    f.__name__: f
    for f in (
        broadcast,
        deep_cache,
        gated,
        merged,
        hooked_by("first_block_cache.FBCBlockHook"),
        hooked_by("mag_cache.MagCacheBlockHook"),
        hooked_by("faster_cache.FasterCacheBlockHook"),
        hooked_by("taylorseer_cache.TaylorSeerCacheHook"),
        hooked_by("layer_skip.AttentionProcessorSkipHook"),
    )
}


@pytest.mark.parametrize("kind", CACHES)
def test_caches_are_refused(kind: str, sd_pipe: StableDiffusionPipeline) -> None:
    later = copy.deepcopy(sd_pipe)
    CACHES[kind](sd_pipe)
    message = r"^The .*U-Net.* (controls would not act there; load the pipeline without it|remove that first)\.$"
    for control in (METHODS["bias"](), AttentionMaps()):
        assert_refused(sd_pipe, control, message)
    with attach(sd_pipe, PROMPT, ()):  # no control that could be lost
        pass
    with attach(later, LAYOUT, METHODS["bias"]()):
        CACHES[kind](later)
        with pytest.raises(ValueError, match=message):
            draw(later)


def test_hooks_and_forwards_that_change_no_values_stay(sd_pipe: StableDiffusionPipeline) -> None:
    with attach(sd_pipe, LAYOUT, METHODS["bias"]()):
        expected = draw(sd_pipe)

    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    counter = Counter()
    HookRegistry.check_if_exists_or_initialize(sd_pipe.unet.mid_block).register_hook(counter, "one's own")
    conv = sd_pipe.unet.conv_in  # as seamless tiling exchanges it
    conv.forward = lambda x: nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    sd_pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with attach(sd_pipe, LAYOUT, METHODS["bias"]()):
        torch.testing.assert_close(draw(sd_pipe), expected)
    assert counter.calls


class Deaf:
    """A processor that takes a mask and ignores it."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        text = args[0] if args else kwargs.get("encoder_hidden_states")
        return AttnProcessor2_0()(attn, hidden_states, text)


@pytest.mark.parametrize("method", ["bias", "dense"])
def test_processors_that_ignore_the_mask(method: str, sd_pipe: StableDiffusionPipeline) -> None:
    sd_pipe.unet.set_attn_processor(Deaf())
    before = processors(sd_pipe)
    with attach(sd_pipe, LAYOUT, METHODS[method]()), pytest.raises(ValueError, match="Deaf ignores the attention mask"):
        draw(sd_pipe)
    assert processors(sd_pipe) == before
    with attach(sd_pipe, LAYOUT, METHODS["spacetime"]()):  # acts without any mask
        draw(sd_pipe)


def test_attention_functions_that_ignore_the_mask(
    sd_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like SageAttention as it is often installed, for all of PyTorch."""
    attention = nn.functional.scaled_dot_product_attention

    def sage(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        return attention(query, key, value, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", sage)
    with (
        attach(sd_pipe, LAYOUT, METHODS["bias"]()),
        pytest.raises(ValueError, match="AttnProcessor2_0 ignores the attention mask.*SageAttention"),
    ):
        draw(sd_pipe)


def test_outputs_that_tell_nothing_are_checked_ever_more_rarely(
    sd_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []
    monkeypatch.setattr("localctl.control.compatible.uses_mask", lambda *given: checked.append(given))
    with attach(sd_pipe, LAYOUT, METHODS["bias"]()):
        draw(sd_pipe, num_inference_steps=8)
    layers = sum(name.endswith("attn2.processor") for name in processors(sd_pipe))
    assert len(checked) == (8 * layers).bit_length() > 3


class Louder:
    """A custom processor that uses the mask and scales its output."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return AttnProcessor2_0()(attn, hidden_states, *args, **kwargs) * 1.5


def test_processors_and_backends_that_use_it(
    sd_pipe: StableDiffusionPipeline, sdxl_pipe: StableDiffusionXLPipeline
) -> None:
    for pipe in (sd_pipe, sdxl_pipe):
        with attach(pipe, LAYOUT, METHODS["bias"]()):
            expected = draw(pipe)
        changes: list[Callable[[], object]] = [
            lambda pipe=pipe: pipe.unet.set_attn_processor(AttnProcessor()),
            lambda pipe=pipe: pipe.enable_attention_slicing(1),
            lambda pipe=pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
            lambda pipe=pipe: pipe.unet.fuse_qkv_projections(),
        ]
        for change in changes:
            change()
            with attach(pipe, LAYOUT, METHODS["bias"]()):
                torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
        pipe.unet.unfuse_qkv_projections()
        pipe.unet.set_attn_processor(Louder())
        plain = draw(pipe)
        with attach(pipe, LAYOUT, METHODS["bias"]()):
            assert (draw(pipe) - plain).abs().max() > 1e-3
        assert any(isinstance(item, Louder) for item in processors(pipe).values())


@pytest.mark.parametrize("layer", ["attn1", "attn2"])
def test_cells_that_are_merged(layer: str, sd_pipe: StableDiffusionPipeline) -> None:
    """Like ToMe: fewer cells reach the attention, and its output is distributed over all cells again."""

    def merging(attn: Attention) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][:, ::2], *args[1:])

        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output.repeat_interleave(2, dim=1)

        attn.register_forward_pre_hook(before)
        attn.register_forward_hook(after)
        return after

    for name, module in sd_pipe.unet.named_modules():
        if isinstance(module, Attention) and name.endswith(layer) and "mid" not in name:
            merging(module)
    steering, other = (METHODS["bias"](), METHODS["spacetime"]()) if layer == "attn2" else (METHODS["dense"](), None)
    for control in (steering, other):
        if control is not None:
            message = re.escape("cells in place of") + ".*ToMe"
            with attach(sd_pipe, LAYOUT, control), pytest.raises(ValueError, match=message):
                draw(sd_pipe)
    if layer == "attn1":  # a bias on the text has all its cells
        plain = draw(sd_pipe)
        with attach(sd_pipe, LAYOUT, METHODS["bias"]()):
            assert (draw(sd_pipe) - plain).abs().max() > 1e-4
