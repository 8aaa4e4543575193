"""Masks from files: what is read, and what is said of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localctl.masks import MaskConfig, load_mask, mask_to_pil, sample_mask


def test_load_mask(tmp_path: Path) -> None:
    mask = sample_mask(MaskConfig(kind="circle", soft_edge=3), (40, 56), np.random.default_rng(0))
    mask_to_pil(mask).save(tmp_path / "mask.png")
    loaded = load_mask(tmp_path / "mask.png", (40, 56))
    assert loaded.shape == (1, 40, 56) and loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, mask, rtol=0, atol=0.5 / 255 + 1e-6)
    Image.fromarray(mask[0].numpy() > 0.5).save(tmp_path / "bits.png")
    assert torch.equal(load_mask(tmp_path / "bits.png"), (mask > 0.5).float())


def test_transparent_is_not_controlled(tmp_path: Path) -> None:
    rgba = np.full((4, 6, 4), 255, np.uint8)
    rgba[:, :3, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png")[0, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_bad_mask_files(tmp_path: Path) -> None:
    Image.new("L", (8, 6)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="black everywhere"):
        load_mask(tmp_path / "black.png")
    with pytest.raises(ValueError, match="is 8x6 pixels but the image is 6x8"):
        load_mask(tmp_path / "black.png", (8, 6))
    (tmp_path / "page.png").write_text("<html></html>")
    with pytest.raises(ValueError, match="not a PNG"):
        load_mask(tmp_path / "page.png")
    with pytest.raises(ValueError, match="no image file"):
        load_mask(tmp_path / "missing.png")


def mask_files(tmp_path: Path) -> dict[str, Path]:
    """Masks that are not black and white, by what they hold; the same disc in each."""
    disc = sample_mask(MaskConfig(kind="circle", count=1), (48, 64), np.random.default_rng(0))[0].numpy()
    inside = disc.astype(np.uint8)
    palette = Image.fromarray(inside, "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    labels = np.repeat(np.arange(4, dtype=np.uint8), 12)[:, None].repeat(64, 1)
    void = labels.copy()
    void[:, :3] = 255  # what is not labelled
    made = {
        "0 and 1": Image.fromarray(inside),
        "0 and 1 in colour": Image.fromarray(inside[..., None].repeat(3, -1)),
        "0 and 1, transparent": Image.fromarray(np.stack([np.full_like(inside, 255)] * 3 + [inside], -1), "RGBA"),
        "16 bit, 0 and 255": Image.fromarray(inside.astype(np.uint16) * 255),
        "16 bit, 0 and 1": Image.fromarray(inside.astype(np.uint16)),
        "ones": Image.fromarray(np.ones_like(inside)),
        "palette": palette,
        "two palette colours": Image.fromarray(inside * 38),
        "ids": Image.fromarray(labels),
        "ids and void": Image.fromarray(void),
        "0 and 2": Image.fromarray(inside * 2),
        "gray classes": Image.fromarray(labels * 60),
    }
    for name, picture in made.items():
        picture.save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in made}


def test_masks_of_0_and_1_are_stretched_and_said(tmp_path: Path) -> None:
    files = mask_files(tmp_path)
    white = torch.from_numpy(np.asarray(Image.open(files["0 and 1"])).astype(np.float32))[None]
    for name in ("0 and 1", "0 and 1 in colour", "0 and 1, transparent", "16 bit, 0 and 255", "16 bit, 0 and 1"):
        with pytest.warns(UserWarning, match=r"holds only 0 and \d+ of \d+; it is read as black and white"):
            assert torch.equal(load_mask(files[name]), white), name
    with pytest.warns(UserWarning, match="holds only 0 and 1 of 255"):
        assert load_mask(files["ones"]).min() == 1


def test_what_may_be_labels_is_left_as_it_is_and_said(tmp_path: Path) -> None:
    files = mask_files(tmp_path)
    for name, words in {
        "palette": "is dim, its brightest value is 0.15 of 1; are these labels",
        "two palette colours": "is dim, its brightest value is 0.15 of 1",
        "ids": "is dim, its brightest value is 0.012 of 1",
        "0 and 2": "is dim",
        "ids and void": r"is mostly flat gray \(0.0039, 0.0078, 0.012 of 1\); are these labels",
        "gray classes": "is mostly flat gray",
    }.items():
        with pytest.warns(UserWarning, match=words) as caught:
            read = load_mask(files[name])
        assert len(caught) == 1, name
        if name not in ("palette",):
            raw = np.asarray(Image.open(files[name]), np.float32) / 255
            assert torch.equal(read[0], torch.from_numpy(raw)), name


@pytest.mark.parametrize("kind", ["box", "circle", "strokes"])
def test_soft_masks_are_read_in_silence(tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder) -> None:
    """Feathered, antialiased (grown and shrunk) and those that a codec has made noisy."""
    for seed in range(4):
        hard = sample_mask(MaskConfig(kind=kind), (64, 96), np.random.default_rng(seed))
        soft = sample_mask(MaskConfig(kind=kind, soft_edge=9), (64, 96), np.random.default_rng(seed))
        small = torch.nn.functional.interpolate(hard[None], size=(21, 33), mode="area")[0]
        large = torch.nn.functional.interpolate(small[None], size=(190, 250), mode="bicubic")[0].clamp(0, 1)
        gradient = torch.linspace(0, 1, 900).expand(1, 90, 900)  # several pixels of one gray
        for mask in (hard, soft, small, large, gradient):
            picture = mask_to_pil(mask)
            picture.save(tmp_path / "mask.png")
            assert torch.equal(load_mask(tmp_path / "mask.png")[0], torch.from_numpy(np.asarray(picture) / 255).float())
            for quality in (20, 50, 80, 95):
                for ending in ("jpg", "webp"):
                    picture.convert("RGB").save(tmp_path / f"mask.{ending}", quality=quality)
                    load_mask(tmp_path / f"mask.{ending}")
    assert not [item for item in recwarn if "mask" in str(item.message)]
