"""The flags of ``sample.py`` for addons: ControlNets, IP-Adapters, LoRAs and learned words."""

from __future__ import annotations

import argparse

from localctl.cli.arguments import boolean
from localctl.settings import CHANNELS

# A flag on the command line replaces these settings of a record.
ADDON_REPLACED = {
    "controlnet_image": ("controlnet_condition_image",),
    "controlnet_condition_image": (
        *("controlnet_image", "controlnet_condition"),
        *("controlnet_condition_model", "controlnet_condition_detector"),
    ),
    "lora": ("lora_scale", "lora_per_prompt"),
}
# Flags of other programs, and ours.
ADDON_OTHER_FLAGS = {
    "--from-file": "--prompts_file",
    "--from_file": "--prompts_file",
    "--controlnet_model": "--controlnet",
    "--controlnet_conditioning_scale": "--controlnet_scale",
    "--controlnet_weight": "--controlnet_scale",
    "--control_guidance_start": "--controlnet_start",
    "--control_guidance_end": "--controlnet_end",
    "--control_image": "--controlnet_condition_image",
    "--lora_weight": "--lora_scale",
    "--ip_adapter_weight": "--ip_adapter_scale",
    "--embedding": "--textual_inversion",
    "--embeddings": "--textual_inversion",
}
_WINDOW = (("start", "active from this fraction of the steps (default 0)"), ("end", "up to this fraction (default 1)"))


def add_addon_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; values of each may be one for all, or one each."""
    group = parser.add_argument_group("ControlNets", "several are summed; one value for all, or one for each")
    group.add_argument("--controlnet", nargs="+", metavar="PLACE", help="folders or hub ids")
    for name, kind, text in (
        ("condition_image", "FILE", "conditions that are already computed"),
        ("image", "FILE", "photos, from which the conditions are computed"),
        ("condition", "KIND", f"of the photos: {', '.join(CHANNELS)}"),
        ("condition_model", "PLACE", "as --condition_model"),
        ("condition_detector", "PLACE", "as --condition_detector"),
        ("mask", "FILE", "white = controlled, or region:PHRASE, a region of the layout; default: everywhere"),
    ):
        group.add_argument(f"--controlnet_{name}", nargs="+", metavar=kind, help=text)
    for name, text in (("scale", "strength (default 1)"), *_WINDOW):
        group.add_argument(f"--controlnet_{name}", nargs="+", type=float, help=text)
    group.add_argument(
        "--guess_mode",
        type=boolean,
        nargs="?",
        const=True,
        metavar="BOOL",
        help="follow the conditions without a prompt",
    )
    group = parser.add_argument_group("IP-Adapters", "images as prompts; one value for all images, or one for each")
    add = group.add_argument
    add("--ip_adapter", nargs="+", metavar="PLACE", help="file (.safetensors), folder, or OWNER/NAME/FILE on the hub")
    add("--ip_adapter_encoder", metavar="PLACE", help="image encoder; default: image_encoder beside the file or above")
    add("--ip_adapter_image", nargs="+", metavar="FILE", help="images to follow; with several adapters, one for each")
    add("--ip_adapter_mask", nargs="+", metavar="FILE", help="where: white = followed, or region:PHRASE")
    for name, text in (("scale", "strength (default 1)"), *_WINDOW):
        add(f"--ip_adapter_{name}", nargs="+", type=float, help=text)
    add = parser.add_argument_group("LoRAs and learned words").add_argument
    add(
        "--lora",
        nargs="+",
        metavar="[NAME=]PLACE",
        help="file (.safetensors), OWNER/NAME/FILE on the hub, or NAME=PLACE",
    )
    add("--lora_scale", nargs="+", type=float, help="strength (default 1), one for all or one each")
    add(
        "--lora_per_prompt",
        nargs="+",
        metavar="NAMES",
        help="what each prompt uses, such as style+red:0.5, all or none; default: all",
    )
    add(
        "--textual_inversion",
        nargs="+",
        metavar="[WORD=]PLACE",
        help="learned words: file (.safetensors), OWNER/NAME/FILE on the hub, or WORD=PLACE",
    )
