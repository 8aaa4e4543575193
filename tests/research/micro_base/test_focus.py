"""Objects of a scene, their words in the caption, and the loss of attention from objects to their words."""

from pathlib import Path

import cv2
import torch
from tolerances import rounding

from localctl.micro.scenes import scene
from research.micro_base.clip import new_tokenizer
from research.micro_base.focus import focus_loss, make_focus, record_attention
from research.micro_base.objects import tokens_of
from research.micro_base.unet import new_unet

UNET = 40 * 9 * 160  # layers in a row, the longest sums of each


def test_tokens_are_the_positions_of_the_objects_words() -> None:
    tokenizer = new_tokenizer()
    for index in range(30):
        item = scene(index)
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(item.caption).input_ids)
        for thing, place in zip(item.objects, tokens_of(item), strict=True):
            assert pieces[place : place + 2] == [f"{thing.color}</w>", f"{thing.shape}</w>"]


def test_focus_is_made_once_of_the_scenes(tmp_path: Path) -> None:
    focus = make_focus(12, tmp_path / "focus.pt")
    assert focus.masks.shape == (12, 3, 16, 16) and focus.near.shape == (12, 16, 16)
    assert abs(float(focus.odds.sum()) - 1) < 1e-9
    for index in range(12):
        item = scene(index)
        for number in range(len(item.objects)):
            area = item.masks[number].mean() * 256
            assert abs(area - float(focus.masks[index, number].sum())) < 0.05 * area
            coarse = cv2.resize(item.masks[number], (16, 16), interpolation=cv2.INTER_AREA)
            assert torch.equal(focus.masks[index, number], torch.from_numpy(coarse).half()), "as rendered in the scene"
            assert focus.near[index].flatten()[focus.masks[index, number].argmax()] > 0.99
        assert (focus.tokens[index] >= 0).sum() == len(item.objects)
        assert (focus.near[index] + 0.01 >= focus.masks[index].sum(0)).all()
    again = make_focus(12, tmp_path / "focus.pt", mix=(0.0, 0.75, 0.0))
    assert torch.equal(again.masks, focus.masks) and torch.equal(again.tokens, focus.tokens)
    pairs = [i for i in range(12) if len(scene(i).objects) == 2 and "background" in scene(i).caption]
    assert pairs and abs(float(again.odds[pairs].sum()) - 0.75 - 0.25 * len(pairs) / 12) < 1e-9


def test_attention_written_out_is_attention() -> None:
    torch.manual_seed(0)
    unet = new_unet().eval()
    noisy, states = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 128)
    with torch.no_grad():
        plain = unet(noisy, 500, states).sample
        kept = record_attention(unet)
        watched = unet(noisy, 500, states).sample
    assert torch.allclose(plain, watched, rtol=0, atol=float(plain.abs().max()) * rounding(UNET))
    assert sorted({attention.shape[1] for attention in kept}) == [16, 64, 256]
    assert all(torch.allclose(attention.sum(-1), torch.ones(attention.shape[:2]), atol=1e-5) for attention in kept)


def test_the_loss_is_least_where_objects_see_their_own_words() -> None:
    masks = torch.zeros(1, 3, 16, 16)
    masks[0, 0, :8], masks[0, 1, 8:, :8] = 1, 1  # and a quarter is background
    tokens, weight, none = torch.tensor([[2, 6, -1]]), torch.ones(1), torch.full((1,), -1)

    def attention(first: int, second: int) -> torch.Tensor:
        place = torch.zeros(1, 256, 10)
        flat = masks.flatten(2)[0].bool()
        place[0, flat[0], first], place[0, flat[1], second] = 1, 1
        place[0, ~(flat[0] | flat[1]), 9] = 1
        return place

    right, share = focus_loss([attention(3, 6)], masks, tokens, none, weight)
    assert float(right) < 1e-3 and float(share) == 1
    swapped, share = focus_loss([attention(6, 3)], masks, tokens, none, weight)
    assert float(swapped) > 5 and float(share) == 0
    everywhere = torch.zeros(1, 256, 10)
    everywhere[..., 2] = 1
    astray, _ = focus_loss([everywhere], masks, tokens, none, weight)
    assert float(astray) > 5
    unseen, _ = focus_loss([everywhere], masks, tokens, none, torch.zeros(1))
    assert float(unseen) == 0
