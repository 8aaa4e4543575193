"""Generate images from a prompt that follow a condition inside a mask, or a layout of regions.

  python sample.py --prompt "a red circle"
  python sample.py --prompt "a red circle" --image photo.png --mask mask.png --adapter runs/canny
  python sample.py --prompt "a red circle" --condition_image edges.png --adapter runs/canny --seeds 1 2 3
  python sample.py --layout scene.json --control bias guidance --set strength=0.6
  python sample.py --layout scene.json --sweep strength=0,.3,.6 outside_strength=0,.2
  python sample.py --layout scene.json --compare all
  python sample.py --layout scene.json --control spacetime_optimized --set epochs=5 --num_inference_steps 20
  python sample.py --layout colours.png --color "#ff0000=a red circle" "#0000ff=a blue star"
  python sample.py --prompt "a red circle" --lora style.safetensors --lora_scale 0.8
  python sample.py --prompt "a red circle" --init_image photo.png --inpaint_mask mask.png
  python sample.py --layout scene.json --upscale 2 --upscale_strength 0.5
  python sample.py --layout auto --prompt "a red circle to the left of a blue star" --control guidance
  python sample.py --from_json outputs/sample/sample.json --output_dir outputs/again
  python sample.py --from_json outputs/sample/00_seed0.png --output_dir outputs/again

Writes one PNG per prompt and seed (and variant); all of them on sheet.png, on compare.png or in the grids of a sweep;
and sample.json, which repeats the run. If the folder holds an earlier run, its files move to a subfolder, earlier_1 or
the next number. Images and masks of any size are scaled and cropped to the size of the run (see
"size"). With several adapters, every adapter flag takes one value for all or one for each.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from localctl.bases import BASES, DTYPE_NAMES, SCHEDULERS, SIGMAS
from localctl.cli.arguments import Arguments, boolean, shortened, size
from localctl.cli.program import explained, one_sentence
from localctl.cli.sample_addons import ADDON_OTHER_FLAGS, ADDON_REPLACED, add_addon_flags
from localctl.jobs.settings import RECORD, SampleSettings, read_record, seed_in_bounds
from localctl.messages import loading, log_to_screen, nearest
from localctl.png import is_png
from localctl.settings import CHANNELS

PROGRAM = "sample.py"
# A flag on the command line replaces these settings of a record.
_REPLACED = {
    **ADDON_REPLACED,
    "image": ("condition_image",),
    "condition_image": ("image", "condition", "condition_model", "condition_detector"),
    "resolution": ("height", "width"),
    "layout": ("region_negatives",),
    "compare": ("control", "sweep", "presets"),
    "control": ("compare", "presets"),
    "sweep": ("compare",),
    "base": ("presets",),
    **{f"use_{name}_sigmas": tuple(f"use_{one}_sigmas" for one in SIGMAS if one != name) for name in SIGMAS},
}
_FUNCTION_WORDS = ("a", "an", "the", "and", "with", "of", "in", "on")  # alone, part of a prompt that was split
# Flags of other programs, and ours.
_OTHER_FLAGS = {
    **ADDON_OTHER_FLAGS,
    "--steps": "--num_inference_steps",
    "--cfg": "--guidance_scale",
    "--cfg_scale": "--guidance_scale",
    "--scale": "--guidance_scale",
    "--model": "--base",
    "--pretrained_model_name_or_path": "--base",
    "--pretrained_vae_model_name_or_path": "--vae",
    "--output": "--output_dir",
    "--sampler": "--scheduler",
    "--adapter_conditioning_scale": "--weight",
    "--num_images_per_prompt": "--seeds, one for each image",
    "--mixed_precision": "--dtype",
    "--mask_image": "--inpaint_mask",
    "--denoising_strength": "--strength",
    "--hires_scale": "--upscale",
}


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run with these flags (None: those of the command line) and print the path of each image.

    Returns 0; 2 after a mistake of the user, 1 after an OSError such as a full disk, with one sentence on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="localctl_") as unpacked:
        options = parse(sys.argv[1:] if argv is None else argv, explained(__doc__, program), program, Path(unpacked))
        with loading():
            from localctl.jobs.run import run

        with log_to_screen(partial(_print_message, program)):
            for path in run(options):
                print(path, flush=True)
    return 0


def _print_message(program: str, text: str) -> None:
    """Print a message on stderr; standard output is for the paths alone."""
    print(f"{program}: {text}", file=sys.stderr, flush=True)


def new_parser(description: str | None = None, program: str = PROGRAM) -> Arguments:
    """Return the parser of all flags; dashes and underscores are equivalent. The namespace has only flags that were
    given."""
    parser = Arguments(program, description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--prompt", nargs="+", action="append", help='prompts, each in quotes: "a red circle"')
    parser.add_argument("--prompts_file", metavar="FILE", help="prompts, one per line, or a layout (JSON) per line")
    _add_adapter_flags(parser)
    add_addon_flags(parser)
    _add_region_flags(parser)
    _add_size_flags(parser)
    _add_sampling_flags(parser)
    _add_start_flags(parser)
    _add_base_flags(parser)
    add = parser.add_argument_group("files").add_argument
    add("--output_dir", help="default: outputs/sample")
    add("--save_steps", type=int, metavar="N", help="write a preview to steps/ after every N sampling steps")
    add(
        "--no_record",
        dest="embed_record",
        action="store_false",
        help="write no record into the images; by default, each PNG holds the settings and small inputs that repeat it",
    )
    add("--from_json", metavar="FILE", help=f"repeat a run: {RECORD} or an image of it; other flags replace settings")
    return parser


def _several(group: Any) -> Callable[..., None]:
    """Return a function that adds a flag of one or more values to ``group``."""

    def add(*names: str, **options: Any) -> None:
        group.add_argument(*names, nargs="+", **options)

    return add


def _add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters", "one value for all adapters, or one for each")
    add = _several(group)
    add("--adapter", metavar="PLACE", help="trained (or plain T2I-) adapters: folder, run, hub id or file of weights")
    add("--image", metavar="FILE", help="photos of any size, from which the conditions are computed")
    add("--condition_image", metavar="FILE", help="conditions that are already computed, instead of --image")
    add(
        "--mask", metavar="FILE", help="white = controlled; any size with the image's aspect ratio; default: everywhere"
    )
    add("--condition", metavar="KIND", help=f"{', '.join(CHANNELS)}; default: as trained")
    add("--condition_model", metavar="PLACE", help="folder or hub id of what computes depth, pose ... from --image")
    add("--condition_detector", metavar="PLACE", help="for pose: folder or hub id of what finds people")
    add("--weight", type=float, help="strength (default 1)")
    add("--level_weights", metavar="W,W,...", help="factors of the weight for each level of features, finest first")
    add("--start", type=float, help="active from this fraction of the steps (default 0)")
    add("--end", type=float, help="active up to this fraction of the steps (default 1)")
    add(
        "--unconditional_scale",
        type=float,
        help="features beside the negative prompt (default: the adapter's own); 0 = stronger",
    )
    group.add_argument("--control_guidance_scale", type=float, help="guidance of the adapters' own (default: none)")


def _add_region_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("regions", "what goes where; a layout contains its own prompt")
    add = _several(group)
    names = "bias, dense, guidance, forward, spacetime, spacetime_optimized, none"
    add(
        "--layout",
        metavar="FILE",
        help="layouts (JSON, or JSON lines), instead of --prompt; or an image with a colour for each region (--color); "
        "or auto: predicted from --prompt",
    )
    add(
        "--color", metavar="COLOR=PHRASE", help="with an image as --layout: what each colour is, '#ff0000=a red circle'"
    )
    group.add_argument("--layout_seed", type=int, help="with --layout auto: sample layouts; default: the most likely")
    names_of = ("--predictor", "--layout_predictor")
    group.add_argument(*names_of, metavar="DIR", help="with --layout auto: your own layout predictor")
    text = "negative prompts of regions act (default); false: they do nothing, as in records of earlier versions"
    group.add_argument("--region_negatives", type=boolean, nargs="?", const=True, metavar="BOOL", help=text)
    add("--control", metavar="NAME", help=f"{names}, or several; default: bias")
    add("--set", metavar="NAME=VALUE", help="settings of the controls, such as strength=0.6")
    add("--sweep", metavar="NAME=V,V", help="vary one or two settings: a labelled grid per image")
    add("--compare", metavar="NAME", help="names, with + for several together, or all: side by side")


def _add_size_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "size",
        "image, condition and mask are scaled and cropped together, as in training. Default: the layout's size;\n"
        "else the image's if it suits the base, or the base's area in the image's aspect ratio; without either, the\n"
        "base's.",
    ).add_argument
    add("--resolution", type=size, metavar="SIZE", help="512 (a square) or WIDTHxHEIGHT such as 512x768")
    add("--height", type=int, help="pixels, a multiple of 8 or 16; alone, the width follows the image's aspect ratio")
    add("--width", type=int, help="as --height")


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    _several(group)(
        "--seeds",
        type=_seed,
        help="one image per prompt and seed (default 0); a seed gives the same noise in any batch and on any device",
    )
    add("--num_inference_steps", type=int, help="default: 30")
    add("--guidance_scale", type=float, help="default: what suits base and control (micro 2 or 4, others 7.5 or less)")
    add("--true_cfg_scale", type=float, help="guidance by a negative prompt on FLUX (default: none) and Qwen-Image (4)")
    add("--guidance_rescale", type=float, help="0 to 1, against over-exposed images; 0.7 is usual with v prediction")
    add("--negative_prompt", metavar="TEXT", help="what to guide away from")
    text = "weights such as (word:1.3) act, long prompts are read whole (default); false: marks are text"
    add("--prompt_weighting", type=boolean, nargs="?", const=True, metavar="BOOL", help=text)
    add("--max_sequence_length", type=int, metavar="N", help="tokens of T5's or Qwen's that a transformer reads")
    add("--clip_skip", type=int, metavar="N", help="leave out the last N layers of the text encoder")
    add("--scheduler", choices=sorted(SCHEDULERS), help="default: what suits base and control")
    spacings = {"karras": "as Karras et al. do", "exponential": "evenly in log sigma", "beta": "by a beta distribution"}
    for name, how in spacings.items():
        flag = f"--use_{name}_sigmas"
        add(flag, type=boolean, nargs="?", const=True, metavar="BOOL", help=f"space the steps {how}")
    add("--batch_size", type=int, help="images at once (default 4); does not change them")


def _add_start_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "from an image, and to a larger one", "the same prompts, regions and adapters"
    ).add_argument
    add("--init_image", metavar="FILE", help="start from this image instead of noise alone")
    add("--strength", type=float, help="how much of it is replaced, up to 1 (default 0.6; with --inpaint_mask 1)")
    add(
        "--inpaint_mask",
        metavar="FILE",
        help="white = generate anew; the other pixels of --init_image stay as they are",
    )
    add("--upscale", type=float, metavar="FACTOR", help="enlarge the result, up to 4 times, in a second pass")
    add("--upscale_strength", type=float, help="how much of the first pass the second one replaces (default 0.5)")


def _add_base_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("base").add_argument
    add("--base", help=f"{', '.join(BASES)}, folder, file or hub id; default: the adapter's, or micro")
    add("--vae", metavar="PLACE", help="another VAE: a diffusers folder or a hub id")
    add("--variant", help="variant of the base's files, such as fp16")
    add("--revision", help="revision of the base on the hub")
    add("--local_files_only", type=boolean, nargs="?", const=True, metavar="BOOL", help="never ask the network")
    add("--dtype", choices=DTYPE_NAMES, help="default: float32")
    add("--device", help="auto (default), cpu, cuda, ...")


def parse(
    argv: Sequence[str], description: str | None = None, program: str = PROGRAM, unpacked: Path = Path()
) -> SampleSettings:
    """Read the flags; settings that no flag gives come from the record of ``--from_json``, if any: a file, or an image
    that holds one, whose inputs are written to ``unpacked``.

    ValueError for bad flags, or a file that is not a record.
    """
    parser = new_parser(description, program)
    argv = parser.spelled(argv)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(argv, unknown, parser)
    typed = vars(known)
    if "prompt" in typed:
        typed["prompt"] = _prompts(typed["prompt"])
    if "prompts_file" in typed:
        typed |= _prompts_of(typed.pop("prompts_file"), typed)
    recorded: dict[str, Any] = {}
    if "from_json" in typed:
        recorded = _recorded(Path(typed["from_json"]).expanduser(), unpacked, typed)
        for name in typed:
            for other in _REPLACED.get(name, ()):
                recorded.pop(other, None)
    options = SampleSettings(**{**recorded, **typed})
    for name in ("weight", "start", "end"):  # typed now; an older record may have them without an adapter
        if name in typed and not options.adapter:
            raise ValueError(f"--{name} is for an adapter, but there is none; give --adapter.")
    if not options.prompt and not options.layout:
        raise ValueError("There is no prompt; give --prompt, or --layout for a scene with regions.")
    return options


def _prompts_of(place: str, typed: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the settings of a file of prompts. ValueError for one that cannot be read, or is not the only source."""
    with loading():
        from localctl.jobs.scenes import read_prompts  # with Pillow and torch
    found = read_prompts(place)
    for name in found:
        if name in typed:
            raise ValueError(f"Give either --prompts_file or --{name}, not both.")
    return found


def _recorded(path: Path, unpacked: Path, typed: Mapping[str, Any]) -> dict[str, Any]:
    if path.is_file() and is_png(path):
        from localctl.jobs.embedded import read_embedded, settings_in  # with Pillow

        return settings_in(read_embedded(path), unpacked, typed)
    return read_record(path)


def _refuse(argv: Sequence[str], unknown: Sequence[str], parser: argparse.ArgumentParser) -> NoReturn:
    """Raise a ValueError for arguments that are no flags, nor values of one."""
    first = unknown[0]
    if not first.startswith("-"):
        parser.error(f"{shortened(first)!r} belongs to no flag; put text in quotes: {_quoted(argv, first)}")
    name = first.partition("=")[0]
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    meant = f"did you mean {_OTHER_FLAGS[name]}?" if name in _OTHER_FLAGS else nearest(name, flags, otherwise="")
    parser.error(f"unrecognized arguments: {shortened(' '.join(unknown))}{meant and f' ({meant})'}")


def _quoted(argv: Sequence[str], word: str) -> str:
    """Return the flag with its text in quotes, where the shell split the text at ``word``."""
    at = argv.index(word)
    end = next((i for i in range(at, len(argv)) if argv[i].startswith("--")), len(argv))
    flag = max((i for i in range(at) if argv[i].startswith("--")), default=-1)
    name, _, value = argv[flag].partition("=") if flag >= 0 else ("", "", "")
    if name in ("--prompt", "--negative_prompt"):
        words = [*([value] if value else []), *argv[flag + 1 : end]]
    else:
        name, words = "--prompt", list(argv[at:end])
    return f'{name} "{shortened(" ".join(words))}"'


def _prompts(groups: Sequence[Sequence[str]]) -> list[str]:
    """Return all prompts, one or several of each ``--prompt``. ValueError for words that look like one prompt without
    quotes, which the shell split."""
    for group in groups:
        words_only = all(len(prompt.split()) <= 1 for prompt in group)
        if len(group) > 1 and (words_only or any(prompt.lower() in _FUNCTION_WORDS for prompt in group)):
            words = shortened(" ".join(group))
            apart = " ".join(f"--prompt {shlex.quote(part)}" for part in group[:2])
            raise ValueError(
                f"--prompt has {len(group)} {'single words' if words_only else 'parts'}; put one prompt in quotes, "
                f'--prompt "{words}", or repeat the flag for each of several: {shortened(apart)} ...'
            )
    return [prompt for group in groups for prompt in group]


def _seed(text: str) -> int:
    """Read a seed. ArgumentTypeError for text that is not a whole number, or has more than 64 bits."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {shortened(text)!r}") from None
    try:
        return seed_in_bounds(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"the seed {shortened(text)} has more than 64 bits; give a smaller one"
        ) from None
