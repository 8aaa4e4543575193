from __future__ import annotations

from typing import Any

import pytest
import torch
from control_helpers import assert_close, bare_pipe, context, golden, layer, steered
from tolerances import rounding
from torch import Tensor

from localctl.control.attention import Scores
from localctl.control.dense import DenseModulation
from localctl.control.segments import Classes
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout, Region

PROMPT = "w1 x w3 w4 y w6 w7 w8"  # between start and end: the golden's token spans
PHRASES = ("w1", "w3 w4", "w6 w7 w8")


def scene(arrays: dict[str, Tensor], **options: Any) -> Layout:
    regions = [Region(phrase, mask=mask, **options) for phrase, mask in zip(PHRASES, arrays["layouts"], strict=True)]
    return Layout(PROMPT, regions=tuple(regions))


def inputs_of(arrays: dict[str, Tensor], kind: str) -> tuple[Tensor, ...]:
    hidden = arrays[f"{kind}.hidden_states"]
    return (hidden, arrays["cross.encoder_hidden_states"]) if kind == "cross" else (hidden,)


@pytest.mark.parametrize("memory_limit", [256.0, 0.01, float("inf")])
@pytest.mark.parametrize("kind", ["cross", "self"])
def test_published_output(kind: str, memory_limit: float) -> None:
    arrays = golden("dense_diffusion")
    attn, inputs = layer(arrays, f"{kind}.w."), inputs_of(arrays, kind)
    where = context(timestep=float(arrays["timestep"]))
    control = DenseModulation(memory_limit=memory_limit)
    assert (control.w_cross, control.w_self, control.size_regularisation) == (1.0, 0.3, 1.0)
    output = steered(control, scene(arrays), attn, inputs, where=where)
    assert_close(output, arrays[f"{kind}.output"])
    plain = steered(control, Layout(PROMPT), attn, inputs, where=where)
    assert_close(plain, arrays[f"{kind}.output_unmodulated"])


@pytest.mark.parametrize("kind", ["cross", "self"])
@pytest.mark.parametrize("rest", ["published", "segment", "free"])
def test_scores_keep_their_range(kind: str, rest: str) -> None:
    arrays = golden("dense_diffusion")
    layout = Layout(PROMPT, regions=(Region("w3 w4", (0, 0, 0.5, 0.5)), Region("w1", (0.25, 0.25, 1, 1))))
    where = context()
    bound = DenseModulation(w_self=1.0, rest=rest).bind(bare_pipe(), [layout])
    attn, inputs = layer(arrays, f"{kind}.w."), inputs_of(arrays, kind)
    scores = Scores(attn, inputs[0], inputs[1] if kind == "cross" else None, None, where.guided_rows)
    bias = bound.attention_bias(where, AttentionLayer("a", kind == "cross", (8, 8)), scores, slice(None))
    assert bias is not None and bias.abs().max() > 0.1
    before = scores.block(slice(None))
    low, high = before.aminmax(dim=-1, keepdim=True)
    edge = rounding(4) * float(before.abs().max())  # of target - score, its share, and the sum
    assert bool((before + bias >= low - edge).all()) and bool((before + bias <= high + edge).all())


def signs(rest: str, kind: str, **region: Any) -> Tensor:
    """Return the sign of the modulation, (Q, K), for one box, the left half, and the word at position 1."""
    arrays = golden("dense_diffusion")
    layout = Layout(PROMPT, regions=(Region("w1", (0, 0, 0.5, 1), **region),))
    bound = DenseModulation(rest=rest).bind(bare_pipe(), [layout])
    attn, inputs = layer(arrays, f"{kind}.w."), inputs_of(arrays, kind)
    scores = Scores(attn, inputs[0], inputs[1] if kind == "cross" else None, None, slice(1, 2))
    bias = bound.attention_bias(context(), AttentionLayer("a", kind == "cross", (8, 8)), scores, slice(None))
    assert bias is not None
    return bias[0].sum(0).sign()


def test_cells_that_no_region_covers() -> None:
    left = torch.zeros(8, 8, dtype=torch.bool)
    left[:, :4] = True
    left = left.flatten()
    flat, segment = signs("published", "cross"), signs("segment", "cross")
    # Never strictly everywhere: the largest score of a row cannot rise, nor the smallest fall.
    assert bool((flat[left][:, 1] >= 0).all()) and bool((flat[left][:, 1] > 0).any())
    assert bool((flat[~left] < 0).any()) and not bool((flat[~left] > 0).any())
    assert bool((segment[~left][:, 1] <= 0).all())
    assert bool((segment[~left][:, [0, 2, 9]] >= 0).all()) and bool((segment[~left][:, [0, 2, 9]] > 0).any())
    torch.testing.assert_close(segment[left], flat[left])
    assert not bool((signs("published", "self")[~left] > 0).any())
    together = signs("segment", "self")
    assert bool((together[~left][:, ~left] >= 0).all()) and bool((together[~left][:, left] <= 0).all())


def test_cells_that_no_region_covers_are_left_free() -> None:
    left = torch.arange(64) % 8 < 4
    free, flat = signs("free", "cross"), signs("published", "cross")
    torch.testing.assert_close(free[left], flat[left])
    assert bool((free[~left][:, 1] < 0).any()) and not bool((free[~left][:, 1] > 0).any())
    assert not bool(free[~left][:, [0, *range(2, free.shape[1])]].any())
    together = signs("free", "self")
    torch.testing.assert_close(together[left], signs("published", "self")[left])
    assert bool((together[~left][:, left] < 0).any()) and not bool((together[~left][:, left] > 0).any())
    assert not bool(together[~left][:, ~left].any())


def test_parts_of_the_queries_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = golden("dense_diffusion")
    sizes: list[int] = []
    block = Scores.block

    def watched(self: Scores, queries: slice) -> Tensor:
        result = block(self, queries)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(Scores, "block", watched)
    for kind in ("cross", "self"):
        attn, inputs = layer(arrays, f"{kind}.w."), inputs_of(arrays, kind)
        whole = steered(DenseModulation(), scene(arrays), attn, inputs)
        full = max(sizes)
        sizes.clear()
        parts = steered(DenseModulation(memory_limit=0.02), scene(arrays), attn, inputs)
        assert_close(parts, whole)
        # In cross-attention, four tensors of float32 for twice as many rows; in self-attention the scores alone.
        per_entry = 2 * 4 * 4 if kind == "cross" else 4
        assert len(sizes) > 1 and max(sizes) * per_entry <= 0.02 * 2**20 < full * per_entry
        sizes.clear()


SCENES = {
    "apart": (Region("w1", (0, 0, 0.5, 0.5), strength=0.4), Region("w3 w4", (0.5, 0.5, 1, 1))),
    "overlapping": (Region("w1", (0, 0, 0.6, 0.6)), Region("w3 w4", (0.25, 0.25, 1, 1)), Region("w6", (0, 0, 1, 0.5))),
    "of two strengths": (Region("w1", (0, 0, 0.6, 0.6), strength=0.4), Region("w3 w4", (0.25, 0.25, 1, 1))),
}


@pytest.mark.parametrize("rest", ["published", "segment", "free"])
@pytest.mark.parametrize("name", SCENES)
def test_factors_give_what_the_matrix_gives(name: str, rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = golden("dense_diffusion")
    attn, inputs = layer(arrays, "self.w."), inputs_of(arrays, "self")
    control = DenseModulation(w_self=1.8 if name == "overlapping" else 0.9, rest=rest)
    layouts = [Layout(PROMPT, regions=SCENES[name]), Layout(PROMPT, regions=SCENES["apart"])]
    where = context(layout_of_row=(0, 1, 0, 1), conditional=(False, False, True, True))
    torch.manual_seed(3)
    rows = torch.cat([inputs[0][1:]] * 4) + 0.3 * torch.randn(4, *inputs[0].shape[1:])
    factors = steered(control, layouts, attn, (rows,), where=where)
    by_factors = Classes.has_factors.func  # type: ignore[attr-defined]
    masks = layouts[0].masks((8, 8), "nearest").flatten(1)
    classes = Classes.of(masks, [region.strength for region in SCENES[name]], rest, 1.0)
    assert by_factors(classes) == (name != "of two strengths")
    monkeypatch.setattr(Classes, "has_factors", False)
    matrix = steered(control, layouts, attn, (rows,), where=where)
    assert_close(factors, matrix)
    assert (matrix - attn(rows)).abs().max() > 1e-2


def test_a_row_does_not_depend_on_its_batch() -> None:
    arrays = golden("dense_diffusion")
    layouts = [scene(arrays), Layout(PROMPT, regions=(Region("w6", (0, 0, 0.5, 1), strength=0.5),)), Layout(PROMPT)]
    where = context(layout_of_row=(0, 1, 2) * 2, conditional=(False,) * 3 + (True,) * 3)
    torch.manual_seed(2)
    for kind in ("cross", "self"):
        attn = layer(arrays, f"{kind}.w.")
        rows = [torch.randn(3, *tensor.shape[1:]) for tensor in inputs_of(arrays, kind)]
        together = steered(DenseModulation(), layouts, attn, tuple(row.repeat(2, 1, 1) for row in rows), where=where)
        for index, layout in enumerate(layouts):
            alone = tuple(row[index : index + 1].repeat(2, 1, 1) for row in rows)
            single = steered(DenseModulation(), layout, attn, alone)
            assert_close(together[[index, 3 + index]], single)


@pytest.mark.parametrize(
    ("control", "changes"),
    [
        (DenseModulation(w_cross=0.0, w_self=0.0), {}),
        (DenseModulation(), {"strength": 0.0}),
        (DenseModulation(start=0.5, end=0.6), {}),
        (DenseModulation(), {"start": 0.5}),
    ],
)
def test_no_modulation_is_no_mask_at_all(control: DenseModulation, changes: dict[str, Any]) -> None:
    arrays = golden("dense_diffusion")
    for kind in ("cross", "self"):
        attn, inputs = layer(arrays, f"{kind}.w."), inputs_of(arrays, kind)
        assert torch.equal(steered(control, scene(arrays, **changes), attn, inputs), attn(*inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_cross": 2.5}, r"w_cross of DenseModulation must lie in \[0, 2\]"),
        ({"size_regularisation": 1.5}, r"size_regularisation of DenseModulation must lie in \[0, 1\]"),
        ({"w_self": float("nan")}, "w_self of a control must be a finite number"),
        ({"decay": -1.0}, "decay of DenseModulation must be at least 0"),
        ({"rest": "other"}, "Unknown rest 'other'"),
        ({"mask_resize": "bilinear"}, "Unknown mask_resize"),
        ({"memory_limit": 0}, "memory_limit must be a positive number"),
        ({"end": 0.0}, "0 <= start < end"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseModulation(**options)


def test_a_strength_beyond_the_range_is_named() -> None:
    layout = Layout("w1", regions=(Region("w1", (0, 0, 1, 1), strength=1.5),))
    with pytest.raises(ValueError, match="strength of the region 'w1' must lie in"):
        DenseModulation().bind(bare_pipe(), [layout])
