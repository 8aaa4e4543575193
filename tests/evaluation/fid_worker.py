"""Run by torchrun: the commands of evaluate_fid.py on several processes; each notes how many batches it extracted.

torchrun --standalone --nproc_per_node 2 tests/evaluation/fid_worker.py FOLDER ARGUMENTS_OF_EVALUATE_FID...
"""

import os
import sys
from pathlib import Path

import torch

from localctl.cli import evaluate_fid
from localctl.metrics.extractors import ClipExtractor


def main(folder: Path, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    seen = []
    extract = ClipExtractor.__call__

    def counted(self, images):
        seen.append(len(images))
        return extract(self, images)

    ClipExtractor.__call__ = counted
    for command in ("ref", "score"):
        assert evaluate_fid.main([command, *arguments]) == 0
    (folder / f"rank_{os.environ['RANK']}_of_{os.environ['WORLD_SIZE']}.txt").write_text(" ".join(map(str, seen)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
