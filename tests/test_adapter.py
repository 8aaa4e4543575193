from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import T2IAdapter

from localctl.adapter import LocalAdapter
from localctl.masks import MASK_RESIZE, resize_mask

MakeAdapter = Callable[..., LocalAdapter]


def left_half(height: int, width: int, batch: int = 1) -> torch.Tensor:
    mask = torch.zeros(batch, 1, height, width)
    mask[..., : width // 2] = 1
    return mask


def test_full_mask_is_the_inner_adapter(make_adapter: MakeAdapter) -> None:
    for mode in MASK_RESIZE:
        adapter = make_adapter(mask_resize=mode)
        condition = torch.rand(2, 1, 64, 64)
        features = adapter(torch.cat([condition, torch.ones(2, 1, 64, 64)], dim=1))
        for feature, inner in zip(features, adapter.adapter(condition), strict=True):
            assert torch.equal(feature, inner)


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (72, 88)])
@pytest.mark.parametrize("mode", MASK_RESIZE)
def test_features_are_masked_at_their_own_size(make_adapter: MakeAdapter, size: tuple[int, int], mode: str) -> None:
    adapter = make_adapter(mask_resize=mode)
    condition, mask = torch.rand(2, 1, *size), left_half(*size, batch=2)
    mask[1] = torch.rand(1, *size)
    features = adapter(torch.cat([condition, mask], dim=1))
    height, width = size[0] // 8, size[1] // 8
    for feature, inner in zip(features, adapter.adapter(condition), strict=True):
        assert feature.shape[-2:] == (height, width)
        assert torch.equal(feature, inner * resize_mask(mask, (height, width), mode))
        height, width = (height + 1) // 2, (width + 1) // 2  # as the U-Net halves


def test_features_see_a_margin_around_the_mask_and_nothing_beyond(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 20:30, 40:52] = 1
    grown = torch.zeros_like(mask)
    grown[..., 15:35, 35:57] = 1
    condition = torch.rand(1, 1, 64, 96)
    make_adapter(mask_margin=5, mask_resize="cover").save_pretrained(tmp_path)
    adapter, plain = LocalAdapter.from_pretrained(tmp_path), make_adapter(mask_resize="cover")
    assert adapter.config["mask_margin"] == 5 and plain.config["mask_margin"] == 0
    pairs = [(mask, grown), (torch.zeros_like(mask), torch.zeros_like(mask)), (torch.ones_like(mask),) * 2]
    for given, seen in [*pairs, (mask / 2, grown / 2)]:
        found, wanted = (a(torch.cat([condition, m], dim=1)) for a, m in ((adapter, given), (plain, seen)))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    whole = make_adapter(mask_margin=4096)(torch.cat([condition, mask], dim=1))  # more than the image
    assert all(torch.equal(a, b) for a, b in zip(whole, plain.adapter(condition), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_margin": -1}, "mask_margin must be a whole number of pixels from 0 to 4096, not -1"),
        ({"mask_margin": 1.5}, "whole number of pixels .*, not 1.5"),
        ({"mask_margin": True}, "whole number of pixels .*, not True"),
        ({"mask_margin": 2, "mask_features": False}, "grows the mask of the features, and mask_features is false"),
    ],
)
def test_margins_without_sense_are_refused(make_adapter: MakeAdapter, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_adapter(**options)


def test_nothing_passes_outside_even_if_features_overflow(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    adapter.adapter.adapter.conv_in.bias.fill_(float("inf"))
    features = adapter(torch.cat([torch.rand(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)], dim=1))
    assert all(torch.equal(feature, torch.zeros_like(feature)) for feature in features)


@pytest.mark.parametrize("mode", MASK_RESIZE)
def test_mask_condition_shuts_out_what_is_outside(make_adapter: MakeAdapter, mode: str) -> None:
    mask = left_half(64, 64) * 0.5  # soft masks blank as well
    first, second = torch.rand(2, 1, 1, 64, 64)
    second = torch.where(mask > 0, first, second)
    for mask_condition in (True, False):
        adapter = make_adapter(mask_resize=mode, mask_condition=mask_condition)
        pairs = zip(*(adapter(torch.cat([x, mask], dim=1)) for x in (first, second)), strict=True)
        # Without it the convolutions carry the difference over the border.
        assert all(torch.equal(a, b) for a, b in pairs) is mask_condition


def test_mask_condition_does_not_dim_a_soft_mask_twice(make_adapter: MakeAdapter) -> None:
    condition, mask = torch.rand(1, 1, 64, 64), torch.full((1, 1, 64, 64), 0.5)
    x = torch.cat([condition, mask], dim=1)
    for kept, plain in zip(make_adapter(mask_condition=True)(x), make_adapter()(x), strict=True):
        assert torch.equal(kept, plain)


@pytest.mark.parametrize("kind", ["sd_pipe", "v_pipe", "sdxl_pipe"])
def test_zero_mask_leaves_the_unet_bit_equal(
    kind: str, make_adapter: MakeAdapter, xl_adapter: LocalAdapter, request: pytest.FixtureRequest
) -> None:
    unet = request.getfixturevalue(kind).unet
    adapter = xl_adapter if kind == "sdxl_pipe" else make_adapter()
    arguments = {
        "sample": torch.randn(2, 4, 12, 20),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(2, 7, unet.config.cross_attention_dim),
    }
    if kind == "sdxl_pipe":
        arguments["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
    with torch.no_grad():
        plain = unet(**arguments).sample
        for value, same in ((0.0, True), (1.0, False)):
            x = torch.cat([torch.rand(2, 1, 96, 160), torch.full((2, 1, 96, 160), value)], dim=1)
            steered = unet(**arguments, down_intrablock_additional_residuals=adapter(x)).sample
            assert torch.equal(steered, plain) is same


def test_gradients_reach_the_adapter_only_through_the_mask(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter().requires_grad_(True)
    x = torch.cat([torch.rand(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)], dim=1)
    for value, moved in ((0.0, False), (1.0, True)):
        x[:, -1] = value
        adapter.zero_grad()
        sum(feature.square().sum() for feature in adapter(x)).backward()
        gradients = [parameter.grad for parameter in adapter.parameters()]
        assert any(bool(gradient.abs().max() > 0) for gradient in gradients) is moved


def test_config_and_weights_survive_saving(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(
        mask_condition=True, mask_resize="cover", condition={"kind": "canny", "low": 50}, base="sd15"
    )
    adapter.save_pretrained(tmp_path / "local")
    adapter.save_t2iadapter(tmp_path / "plain")
    loaded = LocalAdapter.from_pretrained(tmp_path / "local").eval()
    plain = T2IAdapter.from_pretrained(str(tmp_path / "plain")).eval()
    assert (loaded.config["mask_resize"], loaded.config["mask_condition"]) == ("cover", True)
    assert (loaded.config["condition"], loaded.config["base"]) == ({"kind": "canny", "low": 50}, "sd15")
    x = torch.cat([torch.rand(1, 1, 64, 64), left_half(64, 64)], dim=1)
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), adapter(x), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain(x[:, :1]), adapter.adapter(x[:, :1]), strict=True))


@pytest.mark.parametrize("kind", ["full_adapter", "full_adapter_xl", "light_adapter"])
def test_any_t2iadapter_can_be_wrapped(kind: str) -> None:
    inner = T2IAdapter(in_channels=3, channels=[8, 16, 16, 16], num_res_blocks=1, adapter_type=kind)
    adapter = LocalAdapter.from_t2iadapter(inner, mask_resize="cover", base="sd15")
    assert adapter.adapter is inner and adapter.channels_of_condition == 3
    assert (adapter.config["adapter_type"], adapter.config["base"]) == (kind, "sd15")
    condition = torch.rand(1, 3, 64, 64)
    features = adapter(torch.cat([condition, torch.ones(1, 1, 64, 64)], dim=1))
    assert all(torch.equal(a, b) for a, b in zip(features, inner(condition), strict=True))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 64, 64), "2, H, W.*1 channels of the condition and the mask"),
        ((1, 4, 64, 64), "2, H, W"),
        ((2, 64, 64), "2, H, W"),
        ((1, 2, 64, 60), "60x64.*multiples of 8"),
        ((1, 2, 60, 64), "64x60.*multiples of 8"),
    ],
)
def test_bad_input_is_named(make_adapter: MakeAdapter, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_adapter()(torch.zeros(shape))


def test_unknown_mask_resize_is_named() -> None:
    with pytest.raises(ValueError, match="'bilinear'.*area, nearest"):
        LocalAdapter(channels=[8], mask_resize="bilinear")


def test_unmasked_features_are_the_baselines(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    condition, mask = torch.rand(1, 1, 64, 64), left_half(64, 64)
    x = torch.cat([condition, mask], dim=1)
    plain = make_adapter(mask_features=False)
    plain.save_pretrained(tmp_path)
    whole = plain.adapter(condition)  # a plain T2I-Adapter: no mask changes anything
    for adapter in (plain, LocalAdapter.from_pretrained(tmp_path).eval()):
        assert all(torch.equal(a, b) for a, b in zip(adapter(x), whole, strict=True))
    at_input = make_adapter(mask_features=False, mask_condition=True)
    blank = at_input.adapter(torch.where(mask > 0, condition, torch.zeros_like(condition)))
    features = at_input(x)
    assert all(torch.equal(a, b) for a, b in zip(features, blank, strict=True))
    assert any(bool(f[..., f.shape[-1] // 2 :].abs().max() > 0) for f in features)  # it does speak outside


def test_a_dimmed_condition_is_the_published_input(make_adapter: MakeAdapter) -> None:
    """condition * mask, for soft masks as for others; features as they are."""
    adapter = make_adapter(mask_condition=True, dim_condition=True, mask_features=False)
    condition, mask = torch.rand(2, 1, 64, 64), torch.rand(2, 1, 64, 64)
    mask[..., :20] = 0
    features = adapter(torch.cat([condition, mask], dim=1))
    for feature, inner in zip(features, adapter.adapter(condition * mask), strict=True):
        assert torch.equal(feature, inner)
    blanked = make_adapter(mask_condition=True, mask_features=False)(torch.cat([condition, mask], dim=1))
    assert not torch.equal(blanked[0], features[0])


def test_a_weight_per_level_is_part_of_the_adapter(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    x = torch.cat([torch.rand(1, 1, 64, 64), left_half(64, 64)], dim=1)
    plain, weights = make_adapter(), (0.5, 0.0, 1.0, 2.0)
    adapter = make_adapter(level_weights=weights)
    adapter.save_pretrained(tmp_path)
    for made in (adapter, LocalAdapter.from_pretrained(tmp_path)):
        for feature, inner, weight in zip(made(x), plain(x), weights, strict=True):
            assert torch.equal(feature, inner * weight)
    with pytest.raises(ValueError, match=r"has 4 levels of features, but level_weights are \[1.0, 2.0\]; give one"):
        make_adapter(level_weights=(1.0, 2.0))(x)


def test_adapters_saved_before_these_options_are_as_they_were(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(mask_condition=True)
    adapter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("dim_condition", "level_weights", "unconditional_scale", "mask_margin"):
        assert name in config
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.rand(1, 2, 64, 64)
    for first, second in zip(adapter(x), LocalAdapter.from_pretrained(tmp_path)(x), strict=True):
        assert torch.equal(first, second)
    assert LocalAdapter.from_pretrained(tmp_path).config["unconditional_scale"] == 1


@pytest.mark.parametrize("weights", [(1.0, -1.0), (float("nan"),) * 4, ("1",) * 4, (True,) * 4])
def test_level_weights_that_are_none_are_said(make_adapter: MakeAdapter, weights: tuple) -> None:
    with pytest.raises(ValueError, match="level_weights must be finite numbers of at least 0, one per level"):
        make_adapter(level_weights=weights)
