"""Texts of AUTOMATIC1111's web UI: the parameters under an image, its weights of words, and Latent Couple's regions.

Sources: ``modules/infotext_utils.py`` of AUTOMATIC1111/stable-diffusion-webui; ``scripts/two_shot.py`` and
``README.md`` of opparco/stable-diffusion-webui-two-shot.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from localctl.bridges.parts import Exported, Inputs, Size, box_of, boxes_of, layout_of, left_out, text_of, worded
from localctl.layout import Layout, Region
from localctl.prompt_syntax import weigh_parentheses
from localctl.sizes import shown, typed_size

_PARAMETER = re.compile(r'(\w[\w \-/]{1,100}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_NETWORK = re.compile(r"<[a-z]+:[^<>]*>", re.IGNORECASE)
_COUPLE = re.compile(r"divisions=(\S+)\s+positions=(\S+)\s+weights=(\S+)(?:\s+end at step=(\d+))?")
_BASE_WEIGHT, _REGION_WEIGHT = 0.2, 0.8  # Latent Couple's own defaults
_STEPS = 20


@dataclass(frozen=True)
class Infotext:
    """The text under an image: prompt, negative prompt and parameters by name."""

    prompt: str
    negative_prompt: str
    parameters: Mapping[str, str]

    @property
    def size(self) -> Size | None:
        """(height, width) in pixels, if it names a size."""
        return typed_size(self.parameters.get("Size", ""))


def parse_infotext(text: str) -> Infotext:
    """Parse the text under an image. The last line holds parameters if there are at least three, as the web UI reads
    it; the prompt may have several lines."""
    *lines, last = text.strip().split("\n")
    parameters = {key: _unquoted(value) for key, value in _PARAMETER.findall(last)}
    if len(parameters) < 3:
        lines, parameters = [*lines, last], {}
    whole = "\n".join(line.strip() for line in lines)
    prompt, _, negative = whole.partition("Negative prompt:")
    return Infotext(prompt.strip(), negative.strip(), parameters)


def format_infotext(prompt: str, parameters: Mapping[str, str]) -> str:
    """Format what the web UI reads from its prompt box by the arrow button."""
    pairs = [f"{key}: {_quoted(value)}" for key, value in parameters.items()]
    return f"{' '.join(prompt.split(chr(10)))}\n{', '.join(pairs)}\n"


def plain(text: str) -> str:
    """Return a prompt with the web UI's weights as prompts take them here, without networks; warn of what is left
    out."""
    found = _NETWORK.findall(text)
    if found:
        what = ", ".join(dict.fromkeys(found))
        warnings.warn(f"Left out of the text: {what}; load a LoRA by --lora.", stacklevel=2)
    bare = weigh_parentheses(_NETWORK.sub("", text))
    return re.sub(r"\s*,(?:\s*,)+", ",", " ".join(bare.split())).strip(" ,")


def write_couple(layout: Layout, name: str) -> Exported:
    """Write the prompts, joined by AND, with Latent Couple's divisions, positions and weights.

    The weight of a region is 0.8 of its strength, and the prompt of the whole image has 0.2, as by default there.
    """
    prompts, positions = [layout.prompt], ["0:0"]
    weights = [_BASE_WEIGHT]
    for region in worded(layout):
        for x0, y0, x1, y1 in boxes_of(region):
            prompts.append(text_of(region))
            positions.append(f"{decimal(y0)}-{decimal(y1)}:{decimal(x0)}-{decimal(x1)}")
            weights.append(_REGION_WEIGHT * region.strength)
    end = max(region.end for region in layout.regions)
    values = {
        "divisions": ",".join(["1:1"] * len(positions)),
        "positions": ",".join(positions),
        "weights": ",".join(map(decimal, weights)),
        "end at step": str(max(1, round(_STEPS * end))),
    }
    couple = " ".join(f"{key}={value}" for key, value in values.items())
    parameters = {"Steps": str(_STEPS), **size_parameter(layout), "Latent Couple": couple}
    same_end = all(region.end == end for region in layout.regions)
    notes = (
        "Web UI: paste the text into the prompt and press the arrow button, then 'Apply' in Latent Couple.",
        *left_out(layout, ("strength", "prompt", *(("end",) if same_end else ()))),
    )
    return Exported({f"{name}.txt": format_infotext("\nAND ".join(prompts), parameters).encode()}, notes)


def read_couple(text: str, inputs: Inputs) -> Layout:
    """Read Latent Couple's regions: each prompt between AND gets its division, position and weight. Prompts for the
    whole image are the layout's prompt.

    ValueError for numbers that cannot be read, or another count of prompts than of regions.
    """
    found = _COUPLE.search(text)
    if found is None:
        raise ValueError("There is no 'divisions=... positions=... weights=...' of Latent Couple; copy it, too.")
    info = parse_infotext(text)
    prompt = info.prompt if info.parameters else (text[: found.start()] + text[found.end() :]).strip(' "\n')
    prompts = re.split(r"\bAND\b", inputs.prompt or prompt)
    rows = [part.split(",") for part in found.groups()[:3]]
    if {len(row) for row in rows} != {len(prompts)}:
        raise ValueError(
            f"Latent Couple has {', '.join(str(len(row)) for row in rows)} divisions, positions and weights for "
            f"{len(prompts)} prompts between AND; give the same number."
        )
    base, regions = [], []
    for words, division, position, weight in zip(prompts, *rows, strict=True):
        box = _couple_box(division, position)
        words, factor = _composed(words)
        if box == (0, 0, 1, 1):
            base.append(plain(words))
        else:
            strength = round(_float(weight) * factor / _REGION_WEIGHT, 6)
            regions.append(Region(plain(words), box, strength=strength, end=_end(found[4], info)))
    return layout_of(", ".join(filter(None, base)), regions, inputs.size or info.size)


def size_parameter(layout: Layout) -> dict[str, str]:
    """Return the web UI's parameter for the layout's size, if it has one."""
    return {} if layout.size is None else {"Size": f"{layout.width}x{layout.height}"}


def _end(step: str | None, info: Infotext) -> float:
    """Return the share of the steps up to ``step``; 1 if the steps are not known."""
    steps = info.parameters.get("Steps", "")
    if step is None or not steps.isdecimal() or int(step) >= int(steps):
        return 1.0
    if int(step) == 0:
        raise ValueError("Latent Couple ends at step 0, so it has no effect; set 'end at step' there.")
    return int(step) / int(steps)


def _composed(words: str) -> tuple[str, float]:
    """Split a weight of composable prompts ("a dog :0.8") from its words."""
    found = re.fullmatch(rf"(.*\S)\s*:\s*({_NUMBER})\s*", words, re.DOTALL)
    return (found[1], float(found[2])) if found else (words, 1.0)


def _couple_box(division: str, position: str) -> tuple[float, float, float, float]:
    sides = []
    for part, place in zip(_pair(division), _pair(position), strict=True):
        first, _, last = place.partition("-")
        start = _float(first)
        sides.append((start, _float(last) if last else start + 1, _float(part)))
    (top, bottom, high), (left, right, wide) = sides
    return box_of((left, top, right - left, bottom - top), (high, wide))


def _pair(text: str) -> Sequence[str]:
    parts = text.split(":")
    if len(parts) != 2:
        raise ValueError(f"Latent Couple's {text!r} must be ROWS:COLUMNS, such as 1:2; correct it.")
    return parts


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{shown(text)} of Latent Couple is not a number; correct it.") from None


def decimal(value: float) -> str:
    """Return a number without an exponent, whose minus sign would be read as a range."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,\n:]", value) else value


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value
