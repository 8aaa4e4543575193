from __future__ import annotations

from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT, draw
from control_helpers import bare_pipe, context, golden, layer
from diffusers import StableDiffusionPipeline
from tolerances import rounding
from torch import Tensor

from localctl.control.attach import attach
from localctl.control.attention import Scores
from localctl.control.attention_maps import AttentionMaps
from localctl.control.forward_guidance import ForwardGuidance, _BoundForward, _window
from localctl.control.regions import BoundRegions
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout, Region

SCENE = Layout("a cat with a big dog", regions=(Region("cat", (0, 0, 0.5, 0.5)), Region("big dog", (0.5, 0, 1, 1))))


def maps(strength: float, queries: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Return the probabilities (H,64,K) of one layer without and with forward guidance."""
    arrays = golden("region_bias")
    control = ForwardGuidance(strength=strength)
    bound = _BoundForward(control, BoundRegions(bare_pipe(), [SCENE], "area"), ["attn"])
    where, place = context(), AttentionLayer("attn", True, (8, 8))
    assert bound.attends(where, place) == bool(strength)
    scores = Scores(layer(arrays), arrays["hidden_states"], arrays["encoder_hidden_states"], None, where.guided_rows)
    bias = bound.attention_bias(where, place, scores, queries)
    block = scores.block(queries)
    return block.softmax(-1)[0], (block if bias is None else block + bias).softmax(-1)[0]


def test_maps_are_mixed_with_the_window_and_cells_sum_to_one() -> None:
    before, after = maps(0.7)
    expected = before.clone()
    for tokens, region in (((2,), 0), ((5, 6), 1)):
        window = _window(SCENE.masks((8, 8))[region].flatten(), (8, 8))
        for token in tokens:
            mass = before[:, :, token].sum(dim=1, keepdim=True)
            expected[:, :, token] = 0.3 * before[:, :, token] + 0.7 * window * mass
    torch.testing.assert_close(
        after, expected / expected.sum(dim=-1, keepdim=True), rtol=0, atol=rounding(64 + 77)
    )  # probabilities
    torch.testing.assert_close(maps(0.7, slice(16, 40))[1], after[:, 16:40])  # in parts, too
    assert torch.equal(*maps(0.0))
    assert (maps(1.0)[1][:, SCENE.masks((8, 8))[0].flatten() == 0, 2] < 1e-5).all()  # all of it is moved


def test_a_window_is_inside_its_region_and_highest_in_the_middle() -> None:
    mask = Layout("a", regions=(Region("a", (0.25, 0.25, 1, 1)),)).masks((8, 8))[0, 0]
    window = _window(mask.flatten(), (8, 8)).reshape(8, 8)
    torch.testing.assert_close(window.sum(), torch.tensor(1.0))
    assert not window[mask == 0].any() and window.max() == window[4, 4] and window[7, 7] > 0


def test_attention_moves_and_no_effect_is_plain(sd_pipe: StableDiffusionPipeline) -> None:
    before, after = AttentionMaps(), AttentionMaps()
    with attach(sd_pipe, LAYOUT, before):
        plain = draw(sd_pipe)
    with attach(sd_pipe, LAYOUT, [ForwardGuidance(end=1.0), after]):
        assert (draw(sd_pipe) - plain).abs().max() > 1e-3
    assert all(after.mass(0, region) > before.mass(0, region) + 0.05 for region in range(2))
    with attach(sd_pipe, LAYOUT, ForwardGuidance(strength=0.0)):
        assert torch.equal(draw(sd_pipe), plain)
    strong = Layout("a", regions=(Region("a", (0, 0, 1, 1), strength=2.0),))
    with (
        pytest.raises(ValueError, match="strength of the region 'a' must lie in"),
        attach(sd_pipe, strong, ForwardGuidance()),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5}, r"strength of ForwardGuidance must lie in \[0, 1\]"),
        ({"strength": float("nan")}, "finite number"),
        ({"start": 1.0}, "0 <= start < end"),
        ({"mask_resize": "x"}, "Unknown mask_resize"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForwardGuidance(**options)
