"""Predict where the objects of a prompt belong, and draw the layout.

  python -m localctl.layout_predictor "The silver bed was situated to the right of the white couch."
  python -m localctl.layout_predictor "two cats above a dog" --seed 3 --save scene.json

Prints each object with its position (the centre of its box: x from the left, y from the top, both in [0, 1]) and its
box (x0, y0, x1, y1). Several prompts are drawn on one sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from localctl.cli.arguments import Arguments
from localctl.cli.program import explained, one_sentence
from localctl.layout_predictor.parsing import CHUNKERS
from localctl.messages import loading
from localctl.prompt_syntax import warn_of_syntax
from localctl.sizes import near_side

if TYPE_CHECKING:  # what loads torch is imported after the flags are read
    from localctl.layout import Layout, Region

PROGRAM = "python -m localctl.layout_predictor"
OUTPUT = "outputs/layout_predictor/layout.png"
_COLUMNS = 3
_SHORT_SIDE = 320  # px, of the drawn picture


def new_parser(program: str = PROGRAM) -> Arguments:
    """Make the parser of the flags."""
    parser = Arguments(program, explained(__doc__, program))
    add = parser.add_argument
    add("prompt", nargs="+", help="a sentence, or several")
    add("--seed", type=int, help="draw a layout; default: the most likely one")
    add("--predictor", metavar="DIR", help="a folder that its training saved; default: the shipped one")
    add("--chunker", choices=CHUNKERS, default="auto", help="what finds the objects; auto: spaCy where it is installed")
    add("--height", type=int, help="of the layout in pixels, with --width")
    add("--width", type=int, help="as --height")
    add("--output", default=OUTPUT, metavar="FILE", help="the sheet of layouts")
    add("--save", metavar="FILE", help="also write the layout as JSON, for sample.py --layout; of one prompt")
    return parser


def described(region: Region) -> list[str]:
    """One line per box: ``the white couch position: (0.163, 0.377) box: (0.012, 0.212, 0.314, 0.542)``."""
    lines = []
    for x0, y0, x1, y1 in region.boxes:
        centre = f"({(x0 + x1) / 2:.3f}, {(y0 + y1) / 2:.3f})"
        lines.append(f"{region.prompt} position: {centre} box: ({x0:.3f}, {y0:.3f}, {x1:.3f}, {y1:.3f})")
    return lines


def draw(layouts: Sequence[Layout], output: Path) -> None:
    """The layouts on one sheet, each over its prompt. ValueError when the file cannot be written."""
    from localctl.drawing import captioned, grid, render_layout
    from localctl.layout import Layout

    pictures = []
    for layout in layouts:
        height, width = layout.size or (_SHORT_SIDE, _SHORT_SIDE)
        factor = _SHORT_SIDE / min(height, width)
        sized = Layout(layout.prompt, near_side(height * factor), near_side(width * factor), layout.regions)
        picture = captioned(render_layout(sized), _wrapped(layout.prompt, sized.width or _SHORT_SIDE))
        pictures.append(picture)
    rows = [pictures[i : i + _COLUMNS] for i in range(0, len(pictures), _COLUMNS)]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        grid(rows).save(output)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"The drawing {output} cannot be written ({reason}); choose another --output.") from error


def _wrapped(text: str, width: int) -> list[str]:
    """Two lines at most, of about as many letters as fit."""
    letters, lines = width // 6, [""]
    for word in text[: 4 * letters].split():  # no more than two lines show
        if lines[-1] and len(lines[-1]) + len(word) >= letters and len(lines) < 2:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [*lines, ""][:2]


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run with these flags; 0 when done, 2 with one sentence on stderr when something in them cannot work."""
    options = new_parser(program).read(argv)
    if options.save and len(options.prompt) > 1:
        raise ValueError("--save writes one layout; give one prompt.")
    warn_of_syntax(options.prompt)
    with loading():
        from localctl.layout_io import save_layout
        from localctl.layout_predictor.model import load_predictor

    predictor = load_predictor(options.predictor)
    size = {"height": options.height, "width": options.width}
    layouts = [predictor.predict(prompt, options.seed, chunker=options.chunker, **size) for prompt in options.prompt]
    for layout in layouts:
        print(*(line for region in layout.regions for line in described(region)), sep="\n")
    draw(layouts, Path(options.output))
    print(options.output)
    if options.save:
        print(save_layout(layouts[0], options.save))
    return 0
