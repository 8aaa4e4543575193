"""Conditions computed by models: tiny random ones of the real classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from localctl import condition_models
from localctl.bases import BaseConfig
from localctl.condition_models import compute, draw_skeleton, fingerprint, palette
from localctl.conditions import extract
from localctl.data.config import DataConfig
from localctl.data.files import open_files
from localctl.data.micro import MicroScenes
from localctl.edge_networks import HED, LineArt
from localctl.encodings.recipes import CONDITIONS, Recipes
from localctl.settings import CHANNELS, DETECTOR, MODELS, ConditionConfig

pytest_plugins = ["condition_models_here"]

Folder = Callable[[str], Path]


def config_of(kind: str, folder: Folder) -> ConditionConfig:
    detector = {"detector": str(folder("detector"))} if kind == "pose" else {}
    return ConditionConfig(kind=kind, model=str(folder(kind)), **detector)


def photo(seed: int = 0) -> np.ndarray:
    """Coloured squares, 80 x 112 pixels."""
    colours = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return colours.repeat(16, axis=0).repeat(16, axis=1)


@pytest.mark.parametrize("kind", MODELS)
def test_each_kind_is_computed_from_a_photo(kind: str, condition_model: Folder) -> None:
    config = config_of(kind, condition_model)
    found = extract(config, photo())
    assert found.shape == (CHANNELS[kind], 80, 112) and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() <= 1 and found.std() > 0.01
    assert torch.equal(found * 255, (found * 255).round()) and torch.equal(found, extract(config, photo()))
    both = compute(config, [photo(1), photo()])  # as a batch
    assert np.abs(both[1].transpose(2, 0, 1) - found.numpy()).mean() < 2 / 255
    assert not np.array_equal(both[0], both[1])


def test_a_model_is_loaded_once(condition_model: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("depth", condition_model)
    assert condition_models.load_model(config) is condition_models.load_model(ConditionConfig(**config.recorded()))


class _Slope(condition_models._Normals):
    """A wall that comes nearer from left to right."""

    def __init__(self) -> None:
        pass

    def nearness(self, images: object) -> np.ndarray:
        return np.linspace(0, 1, 65)[None, None].repeat(65, axis=1)


def test_normals_point_to_the_side_that_is_farther() -> None:
    """Red is left; a slope of one side over one side is turned by 45 degrees."""
    normal = _Slope()([photo()])[0, 32, 32] * 2 - 1
    assert normal == pytest.approx([0.5**0.5, 0, 0.5**0.5], abs=0.01)


def test_near_is_white_whatever_the_model_predicts(condition_model: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("depth", condition_model)
    model: Any = condition_models.load_model(config)
    distances = torch.linspace(1, 9, 80)[:, None].expand(80, 112)  # the top is near
    found = [{"predicted_depth": distances}]
    monkeypatch.setattr(model.processor, "post_process_depth_estimation", lambda *_, **__: found)
    monkeypatch.setattr(model.config, "depth_estimation_type", "metric", raising=False)
    near = extract(config, photo())[0, :, 0]
    assert near[0] == 1 and near[-1] == 0 and near[40] < 0.2  # the inverse of the distance
    monkeypatch.setattr(model.config, "depth_estimation_type", "relative")
    assert extract(config, photo())[0, :, 0].tolist() == pytest.approx(torch.linspace(0, 1, 80).tolist(), abs=0.003)


def test_colours_of_classes_differ() -> None:
    ade, other = palette(150), palette(133)
    assert ade[0] * 255 == pytest.approx([120, 120, 120]) and ade[149] * 255 == pytest.approx([92, 0, 255])
    for colours, same in ((ade, 1), (other, 0)):  # two classes of ADE20K share a colour
        assert len(np.unique(colours.round(3), axis=0)) == len(colours) - same and not colours[-1].any()


def test_a_skeleton_has_the_colours_of_openpose() -> None:
    """A person who stands upright: the nose is red, the right shoulder on the left of the image is orange."""
    points = np.array([
        [50, 20], [54, 16], [46, 16], [58, 18], [42, 18], [62, 35], [38, 35], [66, 50], [34, 50], [68, 64], [32, 64],
        [58, 66], [42, 66], [58, 86], [42, 86], [58, 105], [42, 105],
    ], dtype=float)  # fmt: skip
    canvas = np.zeros((120, 100, 3), np.uint8)
    draw_skeleton(canvas, points, np.ones(17))
    assert canvas[20, 50].tolist() == [255, 0, 0]
    assert canvas[35, 50].tolist() == [255, 85, 0]  # the neck, between the shoulders
    assert canvas[35, 38].tolist() == [255, 170, 0]
    uncertain = np.ones(17)
    uncertain[0] = 0.1
    without = np.zeros_like(canvas)
    draw_skeleton(without, points, uncertain)
    assert not without[20, 50].any() and np.array_equal(without[40:], canvas[40:])


@pytest.mark.parametrize("network", [HED, LineArt])
def test_edges_keep_the_size_of_the_image(network: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        found = network().eval()(torch.rand(1, 3, 37, 50) * 255)
    assert found.shape == (1, 1, 37, 50) and 0 <= found.min() < found.max() <= 1


def test_default_models_have_names() -> None:
    found = ConditionConfig(kind="pose", model="default")
    assert (found.model, found.detector) == (MODELS["pose"], DETECTOR)
    assert ConditionConfig(kind="depth").recorded().keys().isdisjoint({"model", "detector"})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "canny", "model": "x"}, "condition=canny is computed without a model; leave condition.model out"),
        ({"kind": "depth", "detector": "x"}, "condition.detector finds people for condition=pose"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ConditionConfig(**options)


def test_models_that_are_not_there_or_foreign_are_refused_in_one_sentence(
    condition_model: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for kind, model, detail in (
        ("depth", str(tmp_path), ""),
        ("depth", str(condition_model("segmentation")), "segformer is no model for it"),
        ("hed", str(tmp_path), "there is no ControlNetHED.pth nor a file"),
        ("hed", str(condition_model("lineart")), ""),
    ):
        config = ConditionConfig(kind=kind, model=model)
        with pytest.raises(
            ValueError, match=f"The model {model} of condition={kind} cannot be loaded.*{detail}"
        ) as said:
            extract(config, photo())
        assert "\n" not in str(said.value) and f"for example {MODELS[kind]}" in str(said.value)
    with pytest.raises(
        ValueError, match="pass it as a condition image instead, or set condition.model, for example to"
    ):
        extract(ConditionConfig(kind="depth"), photo())
    with pytest.raises(ValueError, match="no condition images for condition=hed"):
        MicroScenes(count=1, condition=ConditionConfig(kind="hed"))


def test_pickled_weights_are_read_without_running_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(LineArt().state_dict(), tmp_path / "sk_model.pth")
    found = extract(ConditionConfig(kind="lineart", model=str(tmp_path)), photo())
    assert found.std() > 0.01
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (marker,)

    bad = tmp_path / "bad.pth"
    torch.save(Payload(), bad)
    with pytest.raises(ValueError, match="cannot be loaded"):
        extract(ConditionConfig(kind="lineart", model=str(bad)), photo())
    assert not marker.exists()


def test_the_embedded_scenes_take_models(condition_model: Folder) -> None:
    config = config_of("depth", condition_model)
    scenes = MicroScenes(count=2, condition=config)
    image = ((scenes[1].pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    found = scenes[1].condition
    assert torch.equal(found, extract(config, image)) and torch.equal(found, scenes[1].condition)
    assert not torch.equal(found, MicroScenes(count=2, condition=ConditionConfig(kind="depth"))[1].condition)


def test_data_workers_compute_what_this_process_does(condition_model: Folder, tmp_path: Path) -> None:
    """Workers are forked after this process has run the model."""
    from PIL import Image

    for index in range(2):
        Image.fromarray(photo(index)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a photo")
    config = config_of("depth", condition_model)
    data = DataConfig(name="imagefolder", path=str(tmp_path), resolution=64, validation_share=0.0)
    (tmp_path / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{index}.png", "text": "a photo"}}\n' for index in range(2))
    )
    source = open_files(data, config, "train")
    own = [source[index].condition for index in range(2)]
    loader = DataLoader(source, batch_size=None, num_workers=1)
    assert all(torch.equal(one.condition, other) for one, other in zip(loader, own, strict=True))


def test_the_cache_knows_the_weights(condition_model: Folder, tmp_path: Path) -> None:
    """Encodings of another model are not taken for those of this one."""
    import shutil

    recipe = lambda condition: Recipes(  # noqa: E731
        BaseConfig(name="micro"), DataConfig(name="imagefolder", path="x", resolution=64), condition, 0, "float32"
    ).of(CONDITIONS)
    config = config_of("depth", condition_model)
    assert recipe(config) == recipe(config) and recipe(config)["condition model"] == fingerprint(config)
    assert "condition column" not in recipe(config) and "condition model" not in recipe(ConditionConfig(kind="depth"))
    other = tmp_path / "model"
    shutil.copytree(condition_model("depth"), other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    changed = ConditionConfig(kind="depth", model=str(other))
    assert fingerprint(changed) != fingerprint(config)


@pytest.mark.parametrize("kind", ["hed", "lineart"])
def test_the_cache_knows_the_file_of_weights(kind: str, condition_model: Folder) -> None:
    config = config_of(kind, condition_model)
    (file,) = (path for path in condition_model(kind).iterdir() if path.suffix in (".pth", ".safetensors"))
    assert fingerprint(config) == fingerprint(ConditionConfig(kind=kind, model=str(file)))
