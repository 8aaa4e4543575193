"""The look of the studio: one calm theme, light and dark, with the fonts of the reader's own machine."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

# Told apart by people with protanopia, deuteranopia and tritanopia, each from every other; a test measures that.
COLORS = (
    "#007799",
    "#eeee00",
    "#99ccff",
    "#aa8800",
    "#442299",
    "#aa77ff",
    "#994400",
    "#771144",
    "#6611ee",
    "#55aaaa",
    "#99ffdd",
    "#ccbb55",
)
# Of text that is less important; it has contrast on every ground of the page, which a test measures.
SUBDUED, SUBDUED_DARK = "#6b665f", "#a8a29a"
GROUNDS, GROUNDS_DARK = ("#f6f5f2", "#ffffff", "#fbfaf8"), ("#171716", "#222120", "#2b2a28")  # page, block, input
_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Ubuntu", "Cantarell", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def color_of(index: int) -> str:
    """Return the colour of the region with this index, as #rrggbb."""
    return COLORS[index % len(COLORS)]


def text_on(color: str) -> str:
    """Return black or white, whichever is easier to read on ``color``."""
    red, green, blue = ((int(color[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5))
    return "#111111" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "#ffffff"


def theme() -> Any:
    """Return the theme for Gradio; it loads nothing from elsewhere."""
    from gradio import themes

    return themes.Base(
        primary_hue=themes.colors.teal,
        neutral_hue=themes.colors.stone,
        font=[themes.Font(name) for name in _SANS],
        font_mono=[themes.Font(name) for name in _MONO],
        radius_size=themes.sizes.radius_md,
        spacing_size=themes.sizes.spacing_md,
        text_size=themes.sizes.text_md,
    ).set(
        body_background_fill=GROUNDS[0],
        body_background_fill_dark=GROUNDS_DARK[0],
        input_placeholder_color=SUBDUED,
        input_placeholder_color_dark=SUBDUED_DARK,
        body_text_color_subdued=SUBDUED,
        body_text_color_subdued_dark=SUBDUED_DARK,
        block_background_fill=GROUNDS[1],
        block_background_fill_dark=GROUNDS_DARK[1],
        block_border_width="0px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_title_text_weight="500",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        input_background_fill=GROUNDS[2],
        input_background_fill_dark=GROUNDS_DARK[2],
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#0d5f59",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover_dark="#14857c",
        button_primary_text_color="#ffffff",
        panel_border_width="0px",
        color_accent="#0f766e",
        slider_color="#0f766e",
        slider_color_dark="#2aa79b",
    )


def css() -> str:
    """Return the style sheet of the page."""
    return files("localctl.studio").joinpath("studio.css").read_text(encoding="utf-8")
