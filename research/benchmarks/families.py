"""What published transformers cost, from their shapes alone, and what each control adds on small ones.

  python -m research.benchmarks.families  # counts FLOPs, parameters and bytes of all bases; about a minute, no weights
  python -m research.benchmarks.families --bases flux1_dev --sizes 1024
  python -m research.benchmarks.families --overheads  # times every control on a small transformer of each family
  python -m research.benchmarks.families --report  # writes the stored rows into docs/families/cost.md

Rows go to research/results/families/ as JSON lines, or to --output_dir. Counts are made on the meta device as
`train_adapter.py --dry_run` makes them: a product with its addition counts as 2 FLOPs, attention is fused, and the
frozen transformer computes gradients from the first block that the adapter reaches on, and none of its weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localctl.denoisers import denoiser_of
from localctl.evaluation.provenance import write_text
from localctl.training.cost import GIB
from localctl.training.operations import count_operations
from research.benchmarks.families_report import MARKS, read_rows, report
from research.benchmarks.family_shapes import (
    SHAPES,
    Shape,
    bare_pipeline,
    latent_channels,
    made_texts,
    new_transformer,
    shape_named,
    token_adapter,
)
from research.benchmarks.gpu_report import write_page
from research.flags import PAGES, RESULTS

Row = dict[str, Any]
META = torch.device("meta")
FOLDER, PAGE = RESULTS / "families", PAGES / "families" / "cost.md"
SIZES = (512, 1024)


class Counted:
    """A base on the meta device in bfloat16, with a new float32 adapter: what to count."""

    def __init__(self, name: str, shape: Shape) -> None:
        self.name, self.shape = name, shape
        self.transformer = new_transformer(shape.family, shape.config, META, torch.bfloat16)
        self.pipe = bare_pipeline(shape.family, self.transformer)
        self.denoiser: Any = denoiser_of(self.pipe)
        with META:
            self.adapter = token_adapter(self.pipe)
        for parameter in self.adapter.parameters():  # their gradients are counted with the weights
            parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def base(self) -> Row:
        """Return what does not depend on the size of images."""
        return {
            "base": self.name,
            "family": self.shape.family,
            "parameters": sum(parameter.numel() for parameter in self.transformer.parameters()),
            "adapter_parameters": sum(parameter.numel() for parameter in self.adapter.parameters()),
            "blocks": len(self.denoiser.blocks),
            "width": self.denoiser.width,
            "levels": self.adapter.levels,
        }

    def row(self, side: int) -> Row:
        """Count a call of the transformer, and a training step of the adapter with and without gradient checkpointing,
        for one square image of ``side`` pixels."""
        factor = self.pipe.vae_scale_factor
        noisy = _empty(1, latent_channels(self.denoiser), side // factor, side // factor)
        forward, _ = count_operations(lambda: self._output(noisy))
        step, activations = count_operations(lambda: self._step(noisy, side))
        self.transformer.enable_gradient_checkpointing()
        repeated, fewer = count_operations(lambda: self._step(noisy, side))
        self.transformer.disable_gradient_checkpointing()
        return {
            **self.base(),
            "side": side,
            "image_tokens": (side // factor // self.denoiser.patch) ** 2,
            "text_tokens": self.denoiser.blank_texts().states.shape[1],
            "forward_tflop": forward / 1e12,
            "step_tflop": step / 1e12,
            "step_checkpointed_tflop": repeated / 1e12,
            "activations_gib": activations / GIB,
            "activations_checkpointed_gib": fewer / GIB,
        }

    def _output(self, noisy: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        side = noisy.shape[-1] * self.pipe.vae_scale_factor
        conditioning = self.denoiser.conditioning(made_texts(self.denoiser, _empty), (side, side), [None])
        with torch.set_grad_enabled(features is not None):
            return self.denoiser.output(noisy, _empty(1), conditioning, features)

    def _step(self, noisy: Tensor, side: int) -> None:
        channels = self.adapter.channels_of_condition + 1
        features = self.adapter(torch.empty(1, channels, side, side, device=META))
        output = self._output(noisy, [feature.to(noisy.dtype) for feature in features])
        output.float().square().mean().backward()


def _empty(*sides: int) -> Tensor:
    return torch.empty(*sides, device=META, dtype=torch.bfloat16)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def cost_rows(names: Sequence[str], sizes: Sequence[int], tiny: bool) -> Iterator[Row]:
    """Yield a row for each base and size."""
    for name in names:
        counted = Counted(name, shape_named(name, tiny))
        for side in sizes:
            yield counted.row(side)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bases", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="whose cost is counted")
    add("--sizes", nargs="+", type=int, default=list(SIZES), help="sides of the images in pixels, multiples of 16")
    add("--tiny", action="store_true", help="count small transformers of the same classes, to try the command")
    add("--overheads", action="store_true", help="time the controls instead of counting")
    add("--rounds", type=int, default=7, help="of --overheads: runs of each control")
    add("--output_dir", type=Path, default=FOLDER, help="folder of cost.jsonl and overheads.jsonl")
    add("--report", action="store_true", help="write the stored rows into the page instead of measuring")
    add("--page", type=Path, default=PAGE, help="of --report")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, measure or report; return 0."""
    options = parse(argv)
    if options.report:
        write_page(options.page, report(read_rows(options.output_dir)), MARKS)
        return 0
    if options.overheads:
        from research.benchmarks.families_overhead import overhead_rows  # only now: it loads text encoders

        name, rows = "overheads.jsonl", overhead_rows(options.rounds)
    else:
        name, rows = "cost.jsonl", cost_rows(options.bases, options.sizes, options.tiny)
    lines = []
    for row in rows:
        lines.append(json.dumps(row))
        print(lines[-1], flush=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(options.output_dir / name, "\n".join([*lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
