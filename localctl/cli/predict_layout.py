"""Predict a layout for the objects of a prompt, and render it.

  python -m localctl.layout_predictor "The silver bed was situated to the right of the white couch."
  python -m localctl.layout_predictor "two cats above a dog" --seed 3 --save scene.json

Prints each object with its position (the centre of its box: x from the left, y from the top, both in [0, 1]) and its
box (x0, y0, x1, y1). The layouts of several prompts are rendered on one sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from localctl.cli.arguments import Arguments
from localctl.cli.program import explained, one_sentence
from localctl.layout_predictor.parsing import CHUNKERS
from localctl.messages import loading
from localctl.prompt_syntax import read_weights, refuse_foreign
from localctl.sizes import near_side

if TYPE_CHECKING:  # modules that load torch are imported after the flags are read
    from localctl.layout import Layout, Region

PROGRAM = "python -m localctl.layout_predictor"
OUTPUT = "outputs/layout_predictor/layout.png"
_COLUMNS = 3
_SHORT_SIDE = 320  # of a rendered layout, in pixels


def new_parser(program: str = PROGRAM) -> Arguments:
    """Return the parser of the flags."""
    parser = Arguments(program, explained(__doc__, program))
    add = parser.add_argument
    add("prompt", nargs="+", help="one sentence or several")
    add("--seed", type=int, help="sample a layout with this seed; default: the most likely layout")
    own = "folder of a trained predictor; default: the one in the package"
    add("--predictor", "--layout_predictor", metavar="DIR", help=own)
    add("--chunker", choices=CHUNKERS, default="auto", help="how to find the objects; auto: spaCy if it is installed")
    add("--height", type=int, help="height of the layout in pixels, with --width")
    add("--width", type=int, help="width of the layout in pixels, with --height")
    add("--output", default=OUTPUT, metavar="FILE", help="image file of the rendered layouts")
    add("--save", metavar="FILE", help="also write the layout as JSON, for sample.py --layout; for one prompt only")
    return parser


def describe(region: Region) -> list[str]:
    """Return a line per box: ``the white couch position: (0.163, 0.377) box: (0.012, 0.212, 0.314, 0.542)``."""
    lines = []
    for x0, y0, x1, y1 in region.boxes:
        centre = f"({(x0 + x1) / 2:.3f}, {(y0 + y1) / 2:.3f})"
        lines.append(f"{region.prompt} position: {centre} box: ({x0:.3f}, {y0:.3f}, {x1:.3f}, {y1:.3f})")
    return lines


def write_sheet(layouts: Sequence[Layout], output: Path) -> None:
    """Render the layouts on one sheet, each above its prompt. ValueError when ``output`` cannot be written."""
    from localctl.drawing import captioned, grid, render_layout
    from localctl.layout import Layout

    images = []
    for layout in layouts:
        height, width = layout.size or (_SHORT_SIDE, _SHORT_SIDE)
        factor = _SHORT_SIDE / min(height, width)
        sized = Layout(layout.prompt, near_side(height * factor), near_side(width * factor), layout.regions)
        images.append(captioned(render_layout(sized), _wrap(layout.prompt, sized.width or _SHORT_SIDE)))
    rows = [images[i : i + _COLUMNS] for i in range(0, len(images), _COLUMNS)]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        grid(rows).save(output)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"The sheet {output} cannot be written ({reason}); choose another --output.") from error


def _wrap(text: str, width: int) -> list[str]:
    """Wrap ``text`` to two lines of about ``width`` pixels."""
    letters, lines = width // 6, [""]
    for word in text[: 4 * letters].split():  # only two lines are rendered
        if lines[-1] and len(lines[-1]) + len(word) >= letters and len(lines) < 2:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [*lines, ""][:2]


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Predict layouts as ``argv`` says. Returns 0; 2 after a user's error, printed in one sentence."""
    options = new_parser(program).read(argv)
    if options.save and len(options.prompt) > 1:
        raise ValueError("--save writes one layout; give one prompt.")
    for prompt in options.prompt:
        refuse_foreign(prompt, read_weights(prompt))
    with loading():
        from localctl.layout_io import save_layout
        from localctl.layout_predictor.model import load_predictor

    predictor = load_predictor(options.predictor)
    size = {"height": options.height, "width": options.width}
    layouts = [predictor.predict(prompt, options.seed, chunker=options.chunker, **size) for prompt in options.prompt]
    for layout in layouts:
        print(*(line for region in layout.regions for line in describe(region)), sep="\n")
    write_sheet(layouts, Path(options.output))
    print(options.output)
    if options.save:
        print(save_layout(layouts[0], options.save))
    return 0
