"""Compare drawn sets: control inside the mask, similarity, published scores, text alignment, leak, with intervals.

  python evaluate_fid.py gen output_dir=outputs/base                                     the floor, drawn once
  python evaluate_fid.py gen output_dir=outputs/sobel adapter=runs/sobel                 as many as you like
  python evaluate_quantitative_metrics.py base=outputs/base/with_prompts sobel=outputs/sobel/with_prompts

All sets must show the same examples with the same masks and noise; one of them must be the base alone. Writes
metrics.json (every sample's values and where they come from), metrics.md, metrics.tex, bars with intervals in
metrics.png, and a sheet of each set's best, median and worst pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from localctl.evaluation.compare import CEILING, compare
from localctl.evaluation.provenance import REQUIRED, check_provenance, write_bytes, write_json
from localctl.evaluation.sheets import contact_sheet
from localctl.evaluation.tables import as_json, latex, markdown, plot
from localctl.metrics.clip import Clip
from localctl.metrics.extractors import MICRO_CLIP
from localctl.run.program import one_sentence


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate_quantitative_metrics.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sets", nargs="+", metavar="NAME=FOLDER", help="sets drawn by evaluate_fid.py gen")
    parser.add_argument("--against", metavar="NAME", help="row of the paired differences; default: the base alone")
    parser.add_argument("--clip", default=str(MICRO_CLIP), help="CLIPModel of the CLIP score; 'none' for no score")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/metrics"))
    return parser.parse_args(argv)


def named(sets: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER texts by name. ValueError for anything else, and for a name given twice."""
    folders: dict[str, Path] = {}
    for text in sets:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder or name in folders:
            raise ValueError(f"Cannot read the set {text!r}; write NAME=FOLDER, each name once.")
        folders[name] = Path(folder).expanduser()
    return folders


@one_sentence("evaluate_quantitative_metrics.py")
def main(argv: Sequence[str] | None = None) -> int:
    """0 when done; 2 after a mistake of the user's, named in one sentence; 1 when the disk is full."""
    args = parse(argv)
    folders = named(args.sets)
    if args.against is not None and args.against not in (*folders, CEILING):
        raise ValueError(f"There is no set {args.against!r} for --against; choose one of {', '.join(folders)}.")
    clip = None if args.clip == "none" else Clip(args.clip)
    comparison = compare(folders, clip)
    against = args.against or comparison.floor
    content = as_json(comparison, against)
    check_provenance("of this comparison", content, REQUIRED)
    write_json(args.output_dir / "metrics.json", content)
    text = markdown(comparison, against)
    write_bytes(args.output_dir / "metrics.md", text.encode())
    write_bytes(args.output_dir / "metrics.tex", latex(comparison).encode())
    plot(comparison).save(args.output_dir / "metrics.png")
    for name in folders:
        if comparison.interval(name, "f1") is not None:
            contact_sheet(comparison, folders, name).save(args.output_dir / f"sheet_{name.replace('/', '_')}.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
