"""Measure the memory of DenseModulation at 256x448 px on the embedded base: its scores in parts, and all at once.

  python -m research.benchmarks.dense_memory  # against a cap in MiB above plain sampling (--cap)

The peak is that of the bytes of all live tensors that a run makes, without the models' own. The exit status is 1 if
the run in parts exceeds the cap, or if the run without parts does not.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from localctl.control.base import Control
from localctl.control.dense import DenseModulation
from localctl.pipelines import load_pipeline, resolve_base
from localctl.sampling import generate
from localctl.training.cost import OperationWatch
from research.benchmarks.region_cost import SCENE
from research.layout_benchmark.cost import MIB


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--memory_limit", type=float, default=32.0, help="MiB, memory_limit of DenseModulation")
    parser.add_argument("--cap", type=float, default=64.0, help="MiB above plain sampling")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the three peaks; return 0 if they are as expected, else 1."""
    options = parse(argv)
    pipe = load_pipeline("micro")
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "height": options.height,
        "width": options.width,
        "num_inference_steps": 1,
        "guidance_scale": resolve_base("micro").guidance_scale,
        "output_type": "latent",
    }

    def peak(*controls: Control) -> float:
        with OperationWatch() as watch:
            generate(pipe, SCENE, controls, 0, **arguments)
        return watch.peak / MIB

    plain = peak()
    parts, whole = (peak(DenseModulation(memory_limit=limit)) for limit in (options.memory_limit, math.inf))
    print(f"{options.width}x{options.height} px: plain {plain:.0f} MiB")
    good = parts - plain <= options.cap < whole - plain
    print(f"in parts of {options.memory_limit:g} MiB: {parts:.0f} MiB, {parts - plain:+.0f} (cap {options.cap:+g})")
    print(f"all at once: {whole:.0f} MiB, {whole - plain:+.0f}")
    print("as expected" if good else "NOT as expected")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
