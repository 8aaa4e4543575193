from __future__ import annotations

from typing import Any

import pytest
import torch
from control_helpers import assert_close, bare_pipe, context, golden, layer, steered
from diffusers.models.attention_processor import Attention
from tolerances import rounding
from torch import Tensor

from localctl.control.attention import Scores
from localctl.control.region_bias import RegionBias
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout, Region


def scene(arrays: dict[str, Tensor]) -> Layout:
    inside, outside = arrays["strength"].tolist(), arrays["outside_strength"].tolist()
    return Layout(
        "a cat with a big dog",
        regions=(
            Region("cat", mask=arrays["mask_cat"], strength=inside[0], outside_strength=outside[0]),
            Region("big dog", mask=arrays["mask_big_dog"], strength=inside[1], outside_strength=outside[1]),
        ),
    )


def published(**options: Any) -> RegionBias:
    return RegionBias(**{"strength": 1.0, "outside_strength": 1.0, "std": "global", "mask_resize": "centre", **options})


def test_published_output() -> None:
    arrays = golden("region_bias")
    inputs = arrays["hidden_states"], arrays["encoder_hidden_states"]
    where = context(sigma=float(arrays["sigma"]))
    attn = layer(arrays)
    output = steered(published(), scene(arrays), attn, inputs, where=where)
    assert_close(output, arrays["output"])
    for wrong in (published(std="sample"), published(mask_resize="cover"), published(outside_strength=0.0)):
        assert (steered(wrong, scene(arrays), attn, inputs, where=where) - output).abs().max() > 1e-4


@pytest.mark.parametrize("side", [8, 4, 2])
def test_published_maps(side: int) -> None:
    arrays = golden("region_bias")
    bound = published().bind(bare_pipe(), [scene(arrays)])
    where = context(sigma=1.0)
    attn = layer(arrays)
    hidden, text = arrays["hidden_states"][:, : side * side], arrays["encoder_hidden_states"]
    scores = Scores(attn, hidden, text, None, where.guided_rows)
    scores.__dict__["global_std"] = torch.tensor(1.0)
    bias = bound.attention_bias(where, on((side, side)), scores, slice(None))
    assert bias is not None
    assert_close(bias[:, 0], arrays[f"region_map_{side * side}"][1:], terms=1)


def on(size: tuple[int, int]) -> AttentionLayer:
    return AttentionLayer("attn", True, size)


ENTRIES = 3 * 3 * 20 * 7  # of the scores of three rows


def random_scores(rows: int = 3, mask: Tensor | None = None, offset: float = 0.0) -> Scores:
    torch.manual_seed(1)
    attn = Attention(query_dim=12, cross_attention_dim=10, heads=3, dim_head=4).requires_grad_(False)
    hidden = torch.randn(2 * rows, 20, 12) * torch.arange(1, 2 * rows + 1)[:, None, None] + offset
    text = torch.randn(2 * rows, 7, 10) + offset
    return Scores(attn, hidden, text, mask, slice(rows, 2 * rows))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_std_from_moments_is_that_of_the_scores(offset: float) -> None:
    scores = random_scores(offset=offset)
    block = scores.block(slice(None)).double()
    torch.testing.assert_close(scores.std.double(), block.flatten(1).std(dim=1), rtol=rounding(ENTRIES), atol=0)
    everything = Scores(scores.attn, scores.hidden_states, scores.source, None, slice(0, 6)).block(slice(None))
    torch.testing.assert_close(
        scores.global_std.double(), everything.double().std(), rtol=rounding(2 * ENTRIES), atol=0
    )


def test_published_std_takes_the_mask_in() -> None:
    mask = torch.zeros(6, 1, 7)
    mask[:, :, -2:] = -3.0
    scores = random_scores(mask=mask)
    everything = Scores(scores.attn, scores.hidden_states, scores.source, None, slice(0, 6)).block(slice(None))
    torch.testing.assert_close(scores.global_std, (everything + mask[:, None]).std())
    torch.testing.assert_close(scores.std, random_scores().std)  # the project's own form does not


def test_a_row_does_not_depend_on_its_batch() -> None:
    arrays = golden("region_bias")
    attn = layer(arrays)
    torch.manual_seed(2)
    hidden, text = torch.randn(3, 64, 32), torch.randn(3, 8, 24)
    layouts = [scene(arrays), Layout("one two three four five six", regions=(Region("two", (0, 0, 0.5, 1)),))]
    both = context(layout_of_row=(0, 1, 1, 0, 1, 1), conditional=(False,) * 3 + (True,) * 3)
    inputs = hidden.repeat(2, 1, 1), text.repeat(2, 1, 1)
    control = RegionBias(outside_strength=0.3)
    together = steered(control, layouts, attn, inputs, where=both)
    for row, layout in enumerate((0, 1, 1)):
        alone = (hidden[row : row + 1].repeat(2, 1, 1), text[row : row + 1].repeat(2, 1, 1))
        single = steered(control, layouts[layout], attn, alone)
        assert_close(together[3 + row], single[1])
        assert_close(together[row], attn(*alone)[0])  # the negative rows are plain
        other = steered(control, layouts[1 - layout], attn, alone)
        assert (together[3 + row] - other[1]).abs().max() > 1e-3  # a wrong row would show


@pytest.mark.parametrize(
    ("control", "changes"),
    [
        (RegionBias(strength=0.0), {}),
        (RegionBias(), {"strength": 0.0, "outside_strength": 0.0}),
        (RegionBias(start=0.5), {}),
        (RegionBias(), {"start": 0.5}),
        (RegionBias(outside_strength=1.0), {"phrase": None}),
    ],
)
def test_no_bias_is_no_mask_at_all(control: RegionBias, changes: dict[str, Any]) -> None:
    arrays = golden("region_bias")
    attn, inputs = layer(arrays), (arrays["hidden_states"], arrays["encoder_hidden_states"])
    layout = Layout("a cat", regions=(Region(**{"phrase": "cat", "box": (0, 0, 0.5, 0.5), **changes}),))
    assert torch.equal(steered(control, layout, attn, inputs), attn(*inputs))


def test_bias_moves_attention_into_the_region() -> None:
    """Row sums of the attention to the phrase's token rise inside the region and fall outside."""
    arrays = golden("region_bias")
    attn, hidden = layer(arrays), arrays["hidden_states"]
    layout = Layout("a cat", regions=(Region("cat", (0.25, 0.5, 0.75, 1)),))
    bound = RegionBias(strength=0.4, outside_strength=0.1).bind(bare_pipe(), [layout])
    where = context()
    scores = Scores(attn, hidden, arrays["encoder_hidden_states"], None, where.guided_rows)
    bias = bound.attention_bias(where, on((8, 8)), scores, slice(None))
    assert bias is not None
    plain = scores.block(slice(None)).softmax(-1)[0, :, :, 2].mean(0).reshape(8, 8)
    moved = (scores.block(slice(None)) + bias).softmax(-1)[0, :, :, 2].mean(0).reshape(8, 8)
    inside = layout.masks((8, 8))[0, 0] > 0
    assert bool((moved > plain)[inside].all()) and bool((moved < plain)[~inside].all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": "layer"}, "Unknown std 'layer'"),
        ({"mask_resize": "bilinear"}, "Unknown mask_resize 'bilinear'"),
        ({"strength": float("nan")}, "strength of a control must be a finite number"),
        ({"start": 0.6, "end": 0.5}, "0 <= start < end"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegionBias(**options)


def test_the_layer_and_the_control_share_projections() -> None:
    arrays = golden("region_bias")
    attn, inputs, ran = layer(arrays), (arrays["hidden_states"], arrays["encoder_hidden_states"]), []
    for name in ("to_q", "to_k", "to_v", "to_out"):
        part = getattr(attn, name)
        (part[0] if name == "to_out" else part).register_forward_hook(lambda *_, name=name: ran.append(name))
    steered(RegionBias(), scene(arrays), attn, inputs)
    assert sorted(ran) == ["to_k", "to_out", "to_q", "to_v"]
