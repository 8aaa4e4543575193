"""Do the distances grow with damage? Compares scenes with others: untouched, blurred, with noise, and noise alone.

python -m research.metric_sanity --extractor micro_clip efficientnet_lite0 --count 80
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading
from localctl.metrics import EXTRACTORS
from localctl.micro.scenes import scene

if TYPE_CHECKING:  # what loads torch is imported after the flags are read
    from localctl.metrics.extractors import Extractor
    from localctl.metrics.statistics import Statistics

PROGRAM = "research.metric_sanity"
BLURS, NOISES = (2, 4, 8), (60, 100)  # sigma of the blur in pixels, of the noise in levels of 255


def rungs(images: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the images uint8 (n,H,W,3) by kind of damage, each uint8 (n,H,W,3), untouched first."""
    from localctl.seeding import numpy_rng

    rng = numpy_rng(seed, "ladder")
    result = {"as they are": images}
    for sigma in BLURS:
        result[f"blurred, sigma {sigma}"] = np.stack([cv2.GaussianBlur(image, (0, 0), sigma) for image in images])
    for sigma in NOISES:
        noisy = images + rng.normal(0, sigma, images.shape)
        result[f"noise added, sigma {sigma}"] = noisy.clip(0, 255).astype(np.uint8)
    return result | {"nothing but noise": rng.integers(0, 256, images.shape, dtype=np.uint8)}


def climb(extractor: Extractor, count: int) -> dict[str, dict[str, float]]:
    """Return the distances of ``count`` damaged test scenes from ``count`` other, untouched ones, by kind of damage."""
    from localctl.metrics.statistics import distances
    from research.harness import PROFILE, SPLIT, statistics_of

    def statistics(images: np.ndarray) -> Statistics:
        return statistics_of(extractor, list(map(str, range(count))), images.__getitem__, 16, {})

    real, other = (np.stack([scene(i, PROFILE, SPLIT).image for i in range(s, s + count)]) for s in (0, count))
    reference = statistics(real)
    return {name: distances(reference, statistics(x)).values for name, x in rungs(other).items()}


def ladder_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return the distances of :func:`climb` as a Markdown table."""
    from research.page import table

    columns = list(next(iter(rows.values())))
    return "\n".join(table(columns, ((rung, [f"{values[c]:.4g}" for c in columns]) for rung, values in rows.items())))


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; return 0, or 2 after a user's error."""
    parser = Arguments(PROGRAM, __doc__)
    parser.add_argument("--extractor", nargs="+", default=["micro_clip"], choices=EXTRACTORS, help="to be tested")
    parser.add_argument("--weights", help="path of the extractor's weights, where it has no default")
    parser.add_argument("--count", type=int, default=80, help="scenes on each side")
    args = parser.read(argv)
    with loading():
        from localctl.metrics.extractors import load_extractor

    for name in args.extractor:
        print(ladder_table(climb(load_extractor(name, args.weights), args.count)), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
