"""Tiny random models of the real classes that compute conditions, as folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def _save_processor(name: str, folder: Path, size: dict[str, int]) -> None:
    """Save an image processor under the name that published models give it, without asking for torchvision."""
    import transformers

    getattr(transformers, f"{name}Pil")(size=size).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_processor_type": name}))


def _depth(folder: Path) -> None:
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
        reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    DPTForDepthEstimation(config).save_pretrained(folder)
    _save_processor("DPTImageProcessor", folder, {"height": 32, "width": 32})


def _segmentation(folder: Path) -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        num_labels=150,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    _save_processor("SegformerImageProcessor", folder, {"height": 32, "width": 32})


def _pose(folder: Path) -> None:
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    backbone = VitPoseBackboneConfig(
        image_size=[64, 48], patch_size=[16, 16], hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        out_indices=[1],
    )  # fmt: skip
    config = VitPoseConfig(backbone_config=backbone, num_labels=17)
    model = VitPoseForPoseEstimation(config)
    for parameter in model.head.parameters():
        parameter.data.mul_(20)  # sure of its joints
    model.save_pretrained(folder)
    _save_processor("VitPoseImageProcessor", folder, {"height": 64, "width": 48})


def _detector(folder: Path) -> None:
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[32, 32],
        patch_size=8, num_detection_tokens=3, id2label={0: "N/A", 1: "person"}, label2id={"N/A": 0, "person": 1},
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    model.class_labels_classifier.layers[-1].bias.data = torch.tensor([-20.0, 20.0, 0.0])  # people everywhere
    model.save_pretrained(folder)
    _save_processor("YolosImageProcessor", folder, {"height": 32, "width": 32})


def _edges(folder: Path, kind: str) -> None:
    from safetensors.torch import save_file

    from localctl.edge_networks import HED, LineArt

    network = {"hed": HED, "lineart": LineArt}[kind]()
    save_file({name: value.half() for name, value in network.state_dict().items()}, folder / "weights.safetensors")


_MAKERS: dict[str, Callable[[Path], None]] = {
    "depth": _depth,
    "normals": _depth,
    "segmentation": _segmentation,
    "pose": _pose,
    "detector": _detector,
    "hed": lambda folder: _edges(folder, "hed"),
    "lineart": lambda folder: _edges(folder, "lineart"),
}


@pytest.fixture(scope="session")
def condition_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny random model for a kind of condition, or of a ``detector``."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = tmp_path_factory.mktemp(kind)
            _MAKERS[kind](made[kind])
        return made[kind]

    return folder
