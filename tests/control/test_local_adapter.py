from __future__ import annotations

from collections.abc import Callable
from typing import Any

import control_helpers
import pytest
import torch
from attachment_helpers import adapter_control as control
from diffusers import StableDiffusionPipeline, T2IAdapter

from localctl.adapter import LocalAdapter
from localctl.control.base import CallContext
from localctl.control.image_controls import LocalAdapterControl
from localctl.denoisers import bare_denoiser
from localctl.denoisers.base import add_residuals
from localctl.layout import Layout

MakeAdapter = Callable[..., LocalAdapter]


def context(**changes: Any) -> CallContext:
    """Make the context of one image with guidance, in the first of four steps."""
    return control_helpers.context(**{"num_steps": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": torch.zeros(3, 64, 64)}, "3 channels but the adapter takes 1"),
        ({"condition": torch.zeros(64, 64)}, r"condition must be \(C, H, W\)"),
        ({"condition": torch.full((1, 64, 64), 255.0)}, r"condition has values outside \[0, 1\]"),
        ({"condition": torch.full((1, 64, 64), float("nan"))}, "condition has values outside"),
        ({"mask": torch.ones(2, 64, 64)}, "one channel, not 2"),
        ({"mask": torch.ones(1, 64, 72)}, "mask is 72x64 pixels but the condition is 64x64"),
        ({"mask": -torch.ones(1, 64, 64)}, "mask has values outside"),
        ({"start": 0.5, "end": 0.5}, "start < end"),
        ({"end": 1.5}, "start < end <= 1"),
        ({"weight": [1.0, 0.5]}, "2 weights for 4 levels"),
        ({"weight": [1.0, 0.5, float("nan"), 1.0]}, "weight of a control must be a finite number, not nan"),
        ({"weight": "1"}, "1 weights for 4 levels"),
        ({"weight": None}, "weight of a control must be a finite number, not None"),
    ],
)
def test_bad_input_is_named(make_adapter: MakeAdapter, changes: dict[str, Any], message: str) -> None:
    good = {"adapter": make_adapter(), "condition": torch.zeros(1, 64, 64), "mask": torch.ones(1, 64, 64)}
    LocalAdapterControl(**good)
    with pytest.raises(ValueError, match=message):
        LocalAdapterControl(**{**good, **changes})


def test_a_plain_t2iadapter_is_sent_to_the_wrapper() -> None:
    with pytest.raises(ValueError, match="from_t2iadapter"):
        LocalAdapterControl(T2IAdapter(channels=[8]), torch.zeros(3, 64, 64), torch.ones(1, 64, 64))  # type: ignore


def test_a_weight_for_each_level(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline) -> None:
    def residuals(weight: Any) -> list[torch.Tensor]:
        item = control(make_adapter(), weight=weight)
        found = item.bind(sd_pipe, [Layout("a")]).down_residuals(context())
        assert found is not None
        return found

    plain, weights = residuals(1.0), [2.0, 0.0, 0.5, -1]
    for found, whole, weight in zip(residuals(weights), plain, weights, strict=True):
        assert torch.equal(found, whole * weight)
    for same in ([1.0] * 4, (1, 1, 1, 1), 1):
        assert all(torch.equal(found, whole) for found, whole in zip(residuals(same), plain, strict=True))


@pytest.mark.parametrize(("adapter_type", "channels"), [("light_adapter", [8, 8, 8]), ("full_adapter", [8, 8, 8, 8])])
def test_a_light_adapter_has_one_level_more_than_channels(adapter_type: str, channels: list[int]) -> None:
    adapter = LocalAdapter(in_channels=1, channels=channels, num_res_blocks=1, adapter_type=adapter_type)
    assert adapter.levels == len(adapter(torch.zeros(1, 2, 64, 64))) == 4
    assert control(adapter, weight=[1.0, 0.5, 0.0, 1.0]).weight == (1.0, 0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match="3 weights for 4 levels"):
        control(adapter, weight=[1.0, 0.5, 0.0])


def test_rows_get_the_features_of_their_layout(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline) -> None:
    adapter = make_adapter()
    item = control(adapter, layouts=3, weight=0.5)
    bound = item.bind(sd_pipe, [Layout(name) for name in "abc"])
    rows = (2, 0, 0, 2)
    residuals = bound.down_residuals(context(layout_of_row=rows, conditional=(False,) * 2 + (True,) * 2))
    assert residuals is not None
    x = torch.cat([item.condition, item.mask.expand(3, -1, -1, -1)], dim=1)
    for residual, feature in zip(residuals, adapter(x), strict=True):
        torch.testing.assert_close(residual, 0.5 * feature[list(rows)])


def test_the_adapter_runs_once_and_its_features_are_never_handed_out(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    adapter = make_adapter()
    calls: list[int] = []
    adapter.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    bound = control(adapter, layouts=2).bind(sd_pipe, [Layout("a"), Layout("b")])
    first = bound.down_residuals(context(layout_of_row=(0, 1, 0, 1)))
    assert first is not None
    kept = [residual.clone() for residual in first]
    for residual in first:
        residual.zero_()  # as in-place adding within the U-Net may do
    second = bound.down_residuals(context(step=1, layout_of_row=(0, 1, 0, 1)))
    assert second is not None and all(torch.equal(a, b) for a, b in zip(second, kept, strict=True))
    assert calls == [2]
    bound.down_residuals(context(layout_of_row=(1, 1)))  # other layouts: only their features
    assert calls == [2, 1]


def test_the_dtype_is_the_unets(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline) -> None:
    bound = control(make_adapter()).bind(sd_pipe, [Layout("a")])
    residuals = bound.down_residuals(context(dtype=torch.bfloat16))
    assert residuals is not None and {residual.dtype for residual in residuals} == {torch.bfloat16}


def test_windows_that_meet_share_no_step(make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline) -> None:
    for steps in (1, 3, 4, 5, 10):
        active = []
        for start, end in ((0.0, 0.5), (0.5, 1.0)):
            bound = control(make_adapter(), start=start, end=end).bind(sd_pipe, [Layout("a")])
            contexts = [context(step=step, num_steps=steps) for step in range(steps)]
            active.append([bound.down_residuals(item) is not None for item in contexts])
        assert all(first != second for first, second in zip(*active, strict=True))
        assert active[0] == sorted(active[0], reverse=True) and active[0][0]


def test_counts_and_sizes_that_do_not_fit_are_named(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    with pytest.raises(ValueError, match="2 conditions for 3 layouts"):
        control(make_adapter(), layouts=2).bind(sd_pipe, [Layout(name) for name in "abc"])
    bound = control(make_adapter()).bind(sd_pipe, [Layout("a")])
    with pytest.raises(ValueError, match="condition is 64x64 pixels but the image is 128x64"):
        bound.down_residuals(context(image_size=(64, 128), latent_size=(8, 16)))


def test_kept_features_serve_only_the_size_and_weight_they_were_made_for(
    make_adapter: MakeAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    item = control(make_adapter())
    bound = item.bind(sd_pipe, [Layout("a")])
    first = bound.down_residuals(context())
    with pytest.raises(ValueError, match="the image is 128x64"):
        bound.down_residuals(context(image_size=(64, 128), latent_size=(8, 16)))
    item.weight = 0.5
    second = bound.down_residuals(context())
    assert first is not None and second is not None
    for whole, half in zip(first, second, strict=True):
        torch.testing.assert_close(half, whole / 2)


def test_an_adapter_of_another_base_is_refused(
    make_adapter: MakeAdapter, xl_adapter: LocalAdapter, sd_pipe: StableDiffusionPipeline
) -> None:
    for adapter in (xl_adapter, make_adapter(channels=[8, 8, 8, 8])):
        bound = control(adapter).bind(sd_pipe, [Layout("a")])
        with pytest.raises(ValueError, match="trained for this kind of base"):
            bound.down_residuals(context())


@pytest.mark.parametrize("kind", ["sd_pipe", "sdxl_pipe"])
@pytest.mark.parametrize("size", [(8, 8), (9, 11), (12, 20)])
def test_residual_shapes_are_those_the_unet_adds(
    kind: str, size: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    unet = request.getfixturevalue(kind).unet
    shapes = bare_denoiser(unet).residual_shapes(size)
    added = [torch.ones(1, *shape) for shape in shapes]
    more: dict[str, Any] = {}
    if kind == "sdxl_pipe":
        more["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
    text = torch.zeros(1, 7, unet.config.cross_attention_dim)
    unet(torch.zeros(1, 4, *size), 0, text, down_intrablock_additional_residuals=added, **more)
    assert added == []  # every shape fitted, the middle block's too, or the U-Net had raised or left it


def test_add_residuals_sums_level_by_level() -> None:
    one, two = torch.ones(1), torch.full((1,), 2.0)
    assert add_residuals(None, None) is None
    assert add_residuals([one], None) == [one] and add_residuals(None, (two,)) == [two]
    assert add_residuals([one, two], [two]) == [one + two, two]
