"""Compare drawn sets: control inside the mask, similarity, published scores, text alignment, leak, with intervals.

  python evaluate_fid.py gen output_dir=outputs/base                                     the floor, drawn once
  python evaluate_fid.py gen output_dir=outputs/sobel adapter=runs/sobel                 as many as you like
  python evaluate_quantitative_metrics.py base=outputs/base/with_prompts sobel=outputs/sobel/with_prompts

All sets must show the same examples with the same masks and noise; one of them must be the base alone. Writes
metrics.json (every sample's values and where they come from), metrics.md, metrics.tex, bars with intervals in
metrics.png, and a sheet of each set's best, median and worst pictures.

  python evaluate_quantitative_metrics.py photos=PHOTOS mine=FOLDER other=FOLDER         any folders of images

Of folders without such records: Fréchet distance, KID and sizes, against the first one or --against.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading, warn
from localctl.metrics import EXTRACTORS

if TYPE_CHECKING:  # what loads torch is imported after the flags are read
    from localctl.evaluation.compare import Comparison

PROGRAM = "evaluate_quantitative_metrics.py"
RECORD = "settings.json"  # beside the images that evaluate_fid.py gen has generated


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Arguments(PROGRAM, __doc__)
    add = parser.add_argument
    add("sets", nargs="+", metavar="NAME=FOLDER", help="sets drawn by evaluate_fid.py gen, or any folders of images")
    add("--against", metavar="NAME", help="row of the paired differences; default: the base alone, or the first folder")
    add("--clip", help="CLIPModel of the CLIP score, by folder or hub id; default: the embedded base's; none: no score")
    add("--extractor", choices=EXTRACTORS, help="whose features are compared, of plain folders; default: micro_clip")
    add("--weights", help="where the extractor's weights are, if it needs to be told")
    add("--output_dir", type=Path, default=Path("outputs/metrics"), help="where tables and sheets go")
    return parser.read(argv)


def named(sets: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER texts by name; a folder alone is named like itself. ValueError for anything else, and for a name
    given twice."""
    folders: dict[str, Path] = {}
    for text in sets:
        name, equals, folder = text.partition("=")
        if not equals and Path(text).expanduser().is_dir():
            name, equals, folder = Path(text).expanduser().resolve().name, "=", text
        if not equals or not name or not folder or name in folders:
            raise ValueError(f"Cannot read the set {text!r}; write NAME=FOLDER, each name once.")
        folders[name] = Path(folder).expanduser()
    return folders


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """0 when done; 2 after a mistake of the user's, named in one sentence; 1 when the disk is full."""
    args = parse(argv)
    folders = named(args.sets)
    missing = next((folder for folder in folders.values() if not folder.is_dir()), None)
    if missing is not None:
        raise ValueError(f"There is no folder {missing}; check the path.")
    plain = [name for name, folder in folders.items() if not (folder / RECORD).is_file()]
    if plain and len(plain) < len(folders):
        raise ValueError(
            f"{folders[plain[0]]} has no {RECORD} of evaluate_fid.py gen, the others do; compare like with like."
        )
    if plain:
        compare_plain(folders, args)
    else:
        compare_sets(folders, args)
    return 0


def compare_plain(folders: dict[str, Path], args: argparse.Namespace) -> None:
    """Distances between folders of images, to metrics.json and metrics.md."""
    _check_against(args.against, folders)
    if args.clip is not None:
        raise ValueError("--clip scores captions, which plain folders do not have; leave it out, or see --extractor.")
    with loading():
        from localctl.evaluation.plain import check_folders, compare_folders, table
        from localctl.evaluation.provenance import write_json, write_text
        from localctl.metrics.extractors import load_extractor

    check_folders(folders)
    extractor = load_extractor(args.extractor or "micro_clip", args.weights)
    content = compare_folders(folders, extractor, args.against or next(iter(folders)))
    write_json(args.output_dir / "metrics.json", content)
    text = table(content)
    write_text(args.output_dir / "metrics.md", text)
    print(text)
    for warning in content["warnings"]:
        warn(warning)


def compare_sets(folders: dict[str, Path], args: argparse.Namespace) -> None:
    """Everything that can be said of sets with records."""
    if args.extractor is not None or args.weights is not None:
        raise ValueError("--extractor and --weights are for plain folders; of drawn sets, use `evaluate_fid.py score`.")
    with loading():
        from localctl.evaluation.compare import CEILING, compare
        from localctl.metrics.clip import Clip
        from localctl.metrics.extractors import MICRO_CLIP

    _check_against(args.against, folders, CEILING)
    clip = None if args.clip == "none" else Clip(args.clip or MICRO_CLIP)
    comparison = compare(folders, clip)
    print(write(comparison, folders, args.against or comparison.floor, args.output_dir))


def write(comparison: Comparison, folders: dict[str, Path], against: str, output_dir: Path) -> str:
    """All files; the tables as Markdown."""
    from localctl.evaluation.plots import NoMatplotlibError
    from localctl.evaluation.provenance import REQUIRED, check_provenance, write_json, write_text
    from localctl.evaluation.sheets import contact_sheet
    from localctl.evaluation.tables import as_json, latex, markdown, plot

    content = as_json(comparison, against)
    check_provenance("of this comparison", content, REQUIRED)
    write_json(output_dir / "metrics.json", content)
    text = markdown(comparison, against)
    write_text(output_dir / "metrics.md", text)
    write_text(output_dir / "metrics.tex", latex(comparison))
    for name in folders:
        if comparison.interval(name, "f1") is not None:
            contact_sheet(comparison, folders, name).save(output_dir / f"sheet_{name.replace('/', '_')}.png")
    try:
        plot(comparison).save(output_dir / "metrics.png")
    except NoMatplotlibError as error:
        warn(f"metrics.png is left out. {error}")
    return text


def _check_against(against: str | None, folders: dict[str, Path], *more: str) -> None:
    if against is not None and against not in (*folders, *more):
        raise ValueError(f"There is no set {against!r} for --against; choose one of {', '.join(folders)}.")


if __name__ == "__main__":
    sys.exit(main())
