"""Layouts as workflows of ComfyUI in its API format: an area or a mask of the conditioning for each region.

Sources: ``nodes.py`` (ConditioningSetArea, ConditioningSetAreaPercentage, ConditioningSetMask, ConditioningCombine,
ConditioningSetTimestepRange, GLIGENTextBoxApply, LoadImageMask) and ``script_examples/basic_api_example.py`` of
Comfy-Org/ComfyUI.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image, ImageChops

from localctl.bridges.parts import (
    DEFAULT_SIDE,
    Exported,
    Inputs,
    Size,
    as_text,
    box_of,
    json_file,
    layout_of,
    left_out,
    mask_file,
    sides_of,
    text_of,
    worded,
)
from localctl.layout import Layout, Region
from localctl.layout_checks import Box
from localctl.sizes import shown

_KEPT = ("mask", "strength", "start", "end", "prompt", "negative_prompt")
_TEXTS = ("CLIPTextEncode", "CLIPTextEncodeSDXL", "CLIPTextEncodeFlux")
_CHANNELS = ("red", "green", "blue", "alpha")
_MOST = 4096  # nodes on all ways through a workflow
Link = list[Any]


class _Graph:
    """A workflow that is being written."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, **inputs: Any) -> str:
        """Add a node and return its id."""
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return name


def write(layout: Layout, name: str) -> Exported:
    """Write a whole workflow, ready to run once a checkpoint is chosen, and a PNG for each mask.

    ValueError for a strength that ComfyUI does not take.
    """
    graph = _Graph()
    files: dict[str, bytes] = {}
    model = graph.add("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly.safetensors")
    whole = {"positive": layout.prompt, "negative": ""}
    ends = {side: [graph.add("CLIPTextEncode", text=text, clip=[model, 1]), 0] for side, text in whole.items()}
    for index, region in enumerate(worded(layout)):
        if not 0 <= region.strength <= 10:
            raise ValueError(
                f"The strength {region.strength:g} of the region {region.name} is not within 0 to 10, which ComfyUI "
                "takes; change it."
            )
        image = f"{name}_mask_{index}.png" if region.mask is not None else None
        if image:
            files |= mask_file(image, region)
        for side, text in (("positive", text_of(region)), ("negative", region.negative_prompt)):
            if text:
                encoded: Link = [graph.add("CLIPTextEncode", text=text, clip=[model, 1]), 0]
                for link in _placed(graph, encoded, region, image):
                    both = {"conditioning_1": ends[side], "conditioning_2": link}
                    ends[side] = [graph.add("ConditioningCombine", **both), 0]
    height, width = layout.size or (DEFAULT_SIDE, DEFAULT_SIDE)
    latent = graph.add("EmptyLatentImage", width=width, height=height, batch_size=1)
    settings = {"seed": 0, "steps": 30, "cfg": 7.5, "sampler_name": "ddim", "scheduler": "ddim_uniform", "denoise": 1}
    sampled = graph.add("KSampler", model=[model, 0], **ends, latent_image=[latent, 0], **settings)
    decoded = graph.add("VAEDecode", samples=[sampled, 0], vae=[model, 2])
    graph.add("SaveImage", images=[decoded, 0], filename_prefix=name)
    notes = ("ComfyUI: open the file, and choose your checkpoint in the first node.", *left_out(layout, _KEPT))
    if files:
        notes = ("ComfyUI: put the mask images into its folder 'input'.", *notes)
    return Exported({**json_file(f"{name}.json", graph.nodes), **files}, notes)


def _placed(graph: _Graph, link: Link, region: Region, image: str | None) -> Iterator[Link]:
    """Add the nodes that place the text at ``link``; yield the end of each."""
    if (region.start, region.end) != (0, 1):
        link = [graph.add("ConditioningSetTimestepRange", conditioning=link, start=region.start, end=region.end), 0]
    if image:
        mask = [graph.add("LoadImageMask", image=image, channel="red"), 0]
        settings = {"strength": region.strength, "set_cond_area": "default"}
        yield [graph.add("ConditioningSetMask", conditioning=link, mask=mask, **settings), 0]
    for box in region.boxes:
        area = dict(zip(("x", "y", "width", "height"), sides_of(box), strict=True))
        strength = region.strength
        yield [graph.add("ConditioningSetAreaPercentage", conditioning=link, **area, strength=strength), 0]


@dataclass(frozen=True)
class _Place:
    """Where, how strongly and when the conditioning that a way through the workflow leads to acts."""

    box: Box | None = None
    mask: tuple[str, str] | None = None  # an image's name and its channel
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass
class _Reader:
    """Follows a workflow from a sampler back to the texts."""

    nodes: Mapping[str, Any]
    size: Size | None
    found: list[tuple[str, str, _Place]] = field(default_factory=list)  # node of the text, text, place
    passed: set[str] = field(default_factory=set)  # classes of nodes whose effect is left out

    def node(self, link: Any) -> tuple[str, str, Mapping[str, Any]]:
        """Return (id, class, inputs) of the node that a link leads to."""
        name = str(link[0]) if isinstance(link, list) and link else ""
        found = self.nodes.get(name)
        if not isinstance(found, Mapping) or not isinstance(found.get("inputs"), Mapping):
            raise ValueError(f"The workflow has a link to {shown(link)}, where there is no node; export it again.")
        return name, str(found.get("class_type")), found["inputs"]

    def follow(self, end: Any) -> None:
        """Add the texts at the ends of all ways from the link ``end``, in their order."""
        ways, steps = [(end, _Place())], 0
        while ways:
            link, place = ways.pop()
            steps += 1
            if steps > _MOST:
                raise ValueError(f"The workflow has over {_MOST} nodes of conditioning, or a circle; simplify it.")
            name, kind, inputs = self.node(link)
            if kind in _TEXTS:
                texts = [inputs[key] for key in ("text", "text_g", "t5xxl") if key in inputs]
                text = as_text(texts[0] if texts else None, f"The text of the node {name} ({kind})")
                self.found.append((name, text, place))
            elif kind in ("ConditioningCombine", "ConditioningConcat"):
                ways += [(inputs[key], place) for key in reversed(list(inputs)) if key.startswith("conditioning")]
            else:
                side = "negative" if link[1:] == [1] else "positive"
                ways.append(self._through(name, kind, inputs, place, side))

    def _through(self, name: str, kind: str, inputs: Mapping[str, Any], place: _Place, side: str) -> tuple[Any, _Place]:
        """Return the link on which a node acts, and the place with what the node adds to it.

        ``side``: the input of a node that takes a positive and a negative conditioning.
        """
        if kind == "GLIGENTextBoxApply":
            text = as_text(inputs.get("text"), f"The text of the node {name} ({kind})")
            self.found.append((name, text, _Place(self._box(inputs, self._pixels(kind)))))
        into = [key for key in ("conditioning", "conditioning_to", side) if isinstance(inputs.get(key), list)]
        if not into:
            raise ValueError(f"The node {name} ({kind}) has no text that can be read; leave it out of the workflow.")
        return inputs[into[0]], self._narrowed(place, kind, inputs)

    def _narrowed(self, place: _Place, kind: str, inputs: Mapping[str, Any]) -> _Place:
        if kind == "ConditioningSetTimestepRange":
            return replace(place, start=_number(inputs, "start"), end=_number(inputs, "end"))
        if kind.startswith("ConditioningSetArea"):
            place = replace(place, strength=place.strength * _number(inputs, "strength"))
            if kind == "ConditioningSetAreaStrength":
                return place
            return replace(place, box=self._box(inputs, (1, 1) if kind.endswith("Percentage") else self._pixels(kind)))
        if kind == "ConditioningSetMask":
            name, loader, mask = self.node(inputs.get("mask"))
            if loader not in ("LoadImageMask", "LoadImage"):
                raise ValueError(f"A mask comes from the node {name} ({loader}); save it as an image and load that.")
            image = as_text(mask.get("image"), f"The image of the node {name}")
            channel = "alpha" if loader == "LoadImage" else str(mask.get("channel"))
            if channel not in _CHANNELS:
                raise ValueError(
                    f"The node {name} has the channel {shown(channel)}; choose one of {', '.join(_CHANNELS)}."
                )
            return replace(place, mask=(image, channel), strength=place.strength * _number(inputs, "strength"))
        if kind != "GLIGENTextBoxApply":
            self.passed.add(kind)
        return place

    def _pixels(self, kind: str) -> Size:
        if self.size is None:
            raise ValueError(
                f"The node {kind} counts in pixels and the workflow has no size; give --width and --height."
            )
        return self.size

    def _box(self, inputs: Mapping[str, Any], unit: Size) -> Box:
        return box_of([inputs.get(key) for key in ("x", "y", "width", "height")], unit)


def read(content: Mapping[str, Any], inputs: Inputs) -> Layout:
    """Read the conditioning of the first sampler of a workflow in the API format.

    Texts without an area or mask are the prompt. Areas of the negative conditioning that equal a region's become its
    negative prompt.

    ValueError for another format, nodes that hide their text, areas in pixels without a size.
    """
    nodes = content.get("prompt", content)
    if "nodes" in content or not isinstance(nodes, Mapping):
        raise ValueError("The workflow is in ComfyUI's own format; export it there with 'Export (API)'.")
    sizes = [node["inputs"] for node in _of_kind(nodes, "Latent") if "width" in node["inputs"]]
    size = inputs.sized(sizes[0].get("height"), sizes[0].get("width")) if sizes else inputs.size
    samplers = [
        n["inputs"] for kind in ("Sampler", "Guider") for n in _of_kind(nodes, kind) if "positive" in n["inputs"]
    ]
    if not samplers:
        raise ValueError("The workflow has no sampler with a positive conditioning; export the whole workflow.")
    positive, negative = (_Reader(nodes, size) for _ in range(2))
    positive.follow(samplers[0]["positive"])
    if isinstance(samplers[0].get("negative"), list):
        negative.follow(samplers[0]["negative"])
    base = ", ".join(text for _, text, place in positive.found if text and place.box is None and place.mask is None)
    layout = layout_of(inputs.prompt or base, _regions(positive, negative, inputs), size)
    lost = (
        [f"the nodes {', '.join(sorted(positive.passed | negative.passed))}"]
        if positive.passed or negative.passed
        else []
    )
    places = {(place.box, place.mask) for _, _, place in positive.found} - {(None, None)}
    unused = any(text and (place.box, place.mask) not in places for _, text, place in negative.found)
    lost += ["the negative prompt"] if unused else []
    if lost:
        warnings.warn(f"Of the workflow {' and '.join(lost)} are left out: a layout does not hold them.", stacklevel=2)
    return layout


def _regions(positive: _Reader, negative: _Reader, inputs: Inputs) -> list[Region]:
    """Return a region for each text with places; boxes of the same text node are one region's."""
    gathered: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, text, place in positive.found:
        if not text or (place.box is None and place.mask is None):
            continue
        key = (name, place.mask, place.strength, place.start, place.end)
        values = gathered.setdefault(key, {"phrase": text, "box": []})
        if place.mask is None:
            values["box"].append(place.box)
        values |= {"strength": place.strength, "start": place.start, "end": place.end, "image": place.mask}
    avoided: dict[tuple[Any, Any], list[str]] = {}
    for _, text, place in negative.found:
        avoided.setdefault((place.box, place.mask), []).append(text)
    regions = []
    for values in gathered.values():
        image, first = values.pop("image"), (values["box"] or [None])[0]
        values["negative_prompt"] = ", ".join(avoided.get((first, image), []))
        if image is not None:
            values |= {"box": None, "mask": _mask(inputs.image(image[0]), image[1])}
        regions.append(Region(**values))
    return regions


def _mask(image: Image.Image, channel: str) -> Image.Image:
    """Return the mask that ComfyUI makes of a channel: transparent pixels of ``alpha`` are inside."""
    found = image.convert("RGBA").getchannel(channel[0].upper())
    return ImageChops.invert(found) if channel == "alpha" else found


def _of_kind(nodes: Mapping[str, Any], part: str) -> list[Any]:
    """Return the nodes whose class has ``part`` in its name."""
    found = [node for node in nodes.values() if isinstance(node, Mapping) and isinstance(node.get("inputs"), Mapping)]
    return [node for node in found if part in str(node.get("class_type"))]


def _number(inputs: Mapping[str, Any], name: str) -> float:
    value = inputs.get(name, 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"The input {name!r} of the workflow must be a number, not {shown(value)}; set it there.")
    return float(value)
