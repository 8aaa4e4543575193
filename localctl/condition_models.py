"""Models that compute a condition from an image: depth, normals, segmentation, pose, soft edges and line art.

They run on the CPU, in the process that reads the image: a GPU belongs to what is trained or sampled, and data workers
could not share one. So cached, live and sampled conditions are computed alike.
"""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from localctl.files import first_line, sha256
from localctl.messages import no_progress_bars
from localctl.settings import MODELS, ConditionConfig

Compute = Callable[[Sequence[np.ndarray]], np.ndarray]  # images uint8 RGB (H,W,3) of one size to (B,H,W,C) in [0,1]

_FILES = {"hed": "ControlNetHED.pth", "lineart": "sk_model.pth"}  # of the published weights
_KEPT = 4  # models in memory
_METRIC = ("zoedepth", "glpn", "depth_pro")  # kinds of models whose depth grows with the distance
# Colours of the 150 classes of ADE20K, which control adapters for segmentation were trained on (arXiv 1608.05442).
_ADE20K = bytes.fromhex(
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04ff3307"
    "cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffffe0ff086608ff"
    "ff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff4700"
    "00ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ff"
    "adff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc200ff52000aff0070ff3300ff00c2ff"
    "007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ffff001f00b8ff00d6ffff00705cff0000e0ff"
    "70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff5000abed4d6ff0000ccff1400ffffff00"
    "0099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cffb8ff000085ffffd60019c2c266ff005c00ff"
)
# COCO's 17 keypoints and the neck in the order of OpenPose (arXiv 1812.08008): nose, neck, right arm, left arm, right
# leg, left leg, eyes, ears; and its limbs, as pairs of these.
_JOINTS = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_SHOULDERS = (5, 6)
_LEAST_PERSON, _LEAST_JOINT = 0.5, 0.3  # confidence


def compute(config: ConditionConfig, images: Sequence[np.ndarray]) -> np.ndarray:
    """Compute the conditions (B,H,W,C) float32 of ``images``, uint8 RGB (H,W,3) of one size, in steps of 1/255.

    ValueError when the model cannot be loaded.
    """
    values = load_model(config)(images)
    return (np.round(values.clip(0, 1) * 255) / 255).astype(np.float32)


def load_model(config: ConditionConfig, local_files_only: bool = False) -> Compute:
    """Load the model of ``config``; the last ones stay in memory. ValueError when it cannot be loaded.

    local_files_only: never ask the network for a hub id.
    """
    try:
        with no_progress_bars():
            return _load(config.kind, *_places(config, local_files_only))
    except Exception as error:  # missing and damaged files and foreign models each raise their own kind
        names = config.model if config.detector is None else f"{config.model} with the detector {config.detector}"
        raise ValueError(
            f"The model {names} of condition={config.kind} cannot be loaded ({first_line(error).rstrip('.')}); give "
            f"condition.model a folder or hub id of such a model, for example {MODELS[config.kind]}."
        ) from error


def fingerprint(config: ConditionConfig) -> str:
    """Return the sha256 of all files that the model of ``config`` is loaded from. OSError if they are not there."""
    parts = []
    for place in _places(config):
        if place.is_dir():
            inside = sorted(path for path in place.iterdir() if path.suffix in (".json", ".safetensors"))
            parts += [f"{path.name}:{sha256(path)}" for path in inside]
        else:
            parts.append(sha256(place))
    return sha256(" ".join(parts))


@functools.lru_cache(maxsize=_KEPT)
def _load(kind: str, model: Path, detector: Path | None = None) -> Compute:
    if detector is not None:
        return _Pose(model, detector)
    if kind in _FILES:
        return _edges(kind, model)
    kinds: dict[str, Callable[[Path], Compute]] = {
        "depth": _Depth,
        "normals": _Normals,
        "segmentation": _Segmentation,
    }
    return kinds[kind](model)


def _places(config: ConditionConfig, local_files_only: bool = False) -> list[Path]:
    """Return the folders, or the file, of the model and of the detector, if there is one."""
    names = [name for name in (config.model, config.detector) if name is not None]
    return [_place(_FILES.get(config.kind), name, local_files_only) for name in names]


@functools.lru_cache(maxsize=2 * _KEPT)
def _place(file: str | None, name: str, local_files_only: bool) -> Path:
    """Return the folder of a model, or the file ``file`` in it; a hub id is found in the hub's cache, or fetched."""
    local = Path(name).expanduser()
    if (file is None and local.is_dir()) or (file is not None and local.is_file()):
        return local
    if local.is_dir():
        there = [path for path in (local / str(file), *sorted(local.glob("*.safetensors"))) if path.is_file()]
        if not there:
            raise FileNotFoundError(f"there is no {file} nor a file *.safetensors in it")
        return there[0]
    from huggingface_hub import hf_hub_download, snapshot_download  # slow to import

    def find(local_only: bool) -> str:
        if file is not None:
            return hf_hub_download(name, file, local_files_only=local_only)
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], local_files_only=local_only)

    try:
        return Path(find(True))
    except OSError:
        if local_files_only:
            raise
        return Path(find(False))


class _Network:
    """A model of transformers with its image processor, loaded from a folder.

    automatic: the names of classes, of which the first that knows the model loads it.
    """

    automatic: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        import transformers

        options = {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        kinds = [getattr(transformers, name) for name in self.automatic]
        known = [one for one in kinds if not hasattr(one, "_model_mapping") or type(config) in one._model_mapping]
        if not known:
            raise ValueError(f"{config.model_type} is no model for it")
        self.model = known[0].from_pretrained(folder, config=config, use_safetensors=True, **options)
        self.model.eval().requires_grad_(False)
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **options)

    @property
    def config(self) -> Any:
        return self.model.config

    def run(self, images: Sequence[np.ndarray], **given: Any) -> Any:
        """Return the outputs of the model."""
        import torch

        inputs = self.processor(images=list(images), return_tensors="pt", **given)
        with torch.inference_mode():
            return self.model(**inputs)


class _Depth(_Network):
    """Relative inverse depth, scaled to [0, 1] for each image: white is near, as control adapters expect it."""

    automatic = ("AutoModelForDepthEstimation",)

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return self.nearness(images)[..., None]

    def nearness(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return how near each pixel is, (B,H,W) in [0,1]."""
        sizes = [image.shape[:2] for image in images]
        found = self.processor.post_process_depth_estimation(self.run(images), target_sizes=sizes)
        depth = np.stack([one["predicted_depth"].numpy() for one in found]).astype(np.float64)
        metric = getattr(self.config, "depth_estimation_type", "relative") == "metric"
        if metric or self.config.model_type in _METRIC:
            depth = 1 / depth.clip(1e-3)
        low, high = depth.min(axis=(1, 2), keepdims=True), depth.max(axis=(1, 2), keepdims=True)
        return np.where(high > low, (depth - low) / np.where(high > low, high - low, 1), 0)


class _Normals(_Depth):
    """Surface normals of the inverse depth as a relief: red faces left, green up, blue the viewer.

    From the nearest to the farthest point, the relief is as deep as the shorter side of the image.
    """

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        near = self.nearness(images)
        relief = near * min(near.shape[1:])
        down, right = np.gradient(relief, axis=1), np.gradient(relief, axis=2)
        normals = np.stack([right, down, np.ones_like(relief)], axis=-1)
        return (normals / np.linalg.norm(normals, axis=-1, keepdims=True) + 1) / 2


class _Segmentation(_Network):
    """A colour for each class: those of ADE20K for its 150 classes, else hues that differ."""

    automatic = ("AutoModelForUniversalSegmentation", "AutoModelForSemanticSegmentation")

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        sizes = [image.shape[:2] for image in images]
        labels = self.processor.post_process_semantic_segmentation(self.run(images), target_sizes=sizes)
        return palette(len(self.config.id2label))[np.stack([one.numpy() for one in labels])]


class _Pose:
    """Skeletons of all people, as OpenPose renders them, on black."""

    def __init__(self, folder: Path, detector: Path) -> None:
        self.detector = _Detector(detector)
        self.person = next(
            (label for label, name in self.detector.config.id2label.items() if name.lower() == "person"), None
        )
        if self.person is None:
            raise ValueError("the detector knows no label 'person'")
        self.joints = _Joints(folder)
        if self.joints.config.num_labels != 17:
            raise ValueError(f"the model has {self.joints.config.num_labels} keypoints, not the 17 of COCO")

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        sizes = [image.shape[:2] for image in images]
        outputs = self.detector.run(images)
        found = self.detector.processor.post_process_object_detection(
            outputs, threshold=_LEAST_PERSON, target_sizes=sizes
        )
        return np.stack([self._skeletons(image, one) for image, one in zip(images, found, strict=True)])

    def _skeletons(self, image: np.ndarray, found: Mapping[str, Any]) -> np.ndarray:
        boxes = found["boxes"][found["labels"] == self.person].numpy()  # xyxy in pixels
        canvas = np.zeros(image.shape, np.uint8)
        if len(boxes):
            boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
            for person in self.joints.people(image, boxes):
                draw_skeleton(canvas, person["keypoints"].numpy(), person["scores"].numpy())
        return canvas / 255


class _Detector(_Network):
    automatic = ("AutoModelForObjectDetection",)


class _Joints(_Network):
    automatic = ("VitPoseForPoseEstimation",)

    def people(self, image: np.ndarray, boxes: np.ndarray) -> Any:
        """Return the keypoints of the people in boxes (n,4), xywh."""
        import torch

        experts = getattr(self.config.backbone_config, "num_experts", 1) > 1
        given = {"dataset_index": torch.zeros(len(boxes), dtype=torch.long)} if experts else {}
        inputs = self.processor(images=[image], boxes=[boxes], return_tensors="pt")
        with torch.inference_mode():
            outputs = self.model(**inputs, **given)
        return self.processor.post_process_pose_estimation(outputs, boxes=[boxes])[0]


def palette(classes: int) -> np.ndarray:
    """Return the colours (classes + 1, 3) in [0, 1]; the last, black, is for what has no class (-1)."""
    if classes == len(_ADE20K) // 3:
        colours = np.frombuffer(_ADE20K, np.uint8).reshape(-1, 3) / 255
    else:  # hues by the golden ratio, which never come close to each other, in three rings
        hues = [(index * (math.sqrt(5) - 1) / 2 % 1, 1 - 0.25 * (index % 3)) for index in range(classes)]
        colours = np.array([colorsys.hsv_to_rgb(hue, 0.9, value) for hue, value in hues])
    return np.concatenate([colours, np.zeros((1, 3))])


def draw_skeleton(canvas: np.ndarray, points: np.ndarray, scores: np.ndarray) -> None:
    """Render a person with COCO's keypoints (17,2) on ``canvas``, uint8 RGB (H,W,3); uncertain ones are left out."""
    neck = points[list(_SHOULDERS)].mean(axis=0)
    places = np.concatenate([points, neck[None]])[list(_JOINTS)]
    sure = np.concatenate([scores, scores[list(_SHOULDERS)].min(keepdims=True)])[list(_JOINTS)] >= _LEAST_JOINT
    colours = [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(i / 18, 1, 1)) for i in range(18)]
    width = max(2, round(min(canvas.shape[:2]) / 128))
    centres = [tuple(round(float(value)) for value in place) for place in places]
    for colour, (first, last) in zip(colours, _LIMBS, strict=False):
        if sure[first] and sure[last]:
            dimmed = tuple(round(0.6 * part) for part in colour)
            cv2.line(canvas, centres[first], centres[last], dimmed, 2 * width, cv2.LINE_AA)
    for colour, centre, one in zip(colours, centres, sure, strict=True):
        if one:
            cv2.circle(canvas, centre, width, colour, -1, cv2.LINE_AA)


def _edges(kind: str, path: Path) -> Compute:
    """Load soft edges (HED) or line art from a file of weights, of which only tensors are read."""
    import torch

    from localctl.edge_networks import HED, LineArt

    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    network: torch.nn.Module = HED() if kind == "hed" else LineArt()
    network.load_state_dict(weights)
    network.float().eval().requires_grad_(False)

    def compute_edges(images: Sequence[np.ndarray]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
        with torch.inference_mode():
            return network(pixels).permute(0, 2, 3, 1).numpy()

    return compute_edges
