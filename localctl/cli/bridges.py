"""Move adapters and layouts to other programs, and from them.

  localctl export outputs/run --format comfyui --output canny_local.safetensors
  localctl export scene.json --format regional-prompter --output_dir exported
  localctl import t2iadapter_canny_sd15v2.pth --output_dir canny --condition canny --base sd15
  localctl import workflow.json --output_dir layouts

The kind is recognised: a layout is a .json file, everything else is an adapter, as --adapter of `localctl sample` takes
it. Prints the files that it writes, and what the other format cannot hold. docs/bridges.md lists the formats.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.messages import loading

if TYPE_CHECKING:  # modules that load torch are imported after the flags are read
    from PIL import Image

    from localctl.layout import Layout

PROGRAM = "localctl export"
EXPORTED, IMPORTED = "outputs/exported", "outputs/imported"


def new_parser(program: str) -> Arguments:
    """Return the parser of the flags of ``localctl export`` or ``localctl import``."""
    parser = Arguments(program, __doc__)
    add = parser.add_argument
    export = program.endswith("export")
    if export:
        add("places", nargs="+", metavar="PLACE", help="a layout (.json), or an adapter; several adapters: one file")
        add(
            "--format",
            help="of an adapter: tencentarc, comfyui, webui, diffusers, local, bundle; of a layout: see docs",
        )
        add("--output", metavar="FILE", help="file to write; default: one in --output_dir")
        add("--list", action="store_true", help="only print the names of the adapters in a folder or file")
    else:
        add("place", metavar="PLACE", help="a file of weights, a layout of another program, or a folder of scenes")
        add("--format", help="of an adapter: local or diffusers; of a layout: its format; default: local, recognised")
        add("--condition", metavar="NAME", help="an adapter's condition, as condition=NAME of `localctl train`")
        add("--base", help="base that an adapter was trained on")
        add("--mask_resize", help="how an adapter resizes its mask: area, nearest, inside, cover")
        whole = "of regional-prompter and latent-couple the whole text, with its ADDCOL, ADDROW, BREAK or AND"
        add("--prompt", help=f"prompt of a layout, in place of the file's; {whole}")
        add("--height", type=int, help="height of a layout in pixels, with --width")
        add("--width", type=int, help="width of a layout in pixels, with --height")
        add("--index", help="scene of a file or folder with several; of a folder, all by default")
        add("--split", help="of DenseDiffusion's benchmark: valset or testset")
        add("--color", nargs="+", metavar="COLOR=PHRASE", help="of an image with one colour per region: what they are")
    folder = EXPORTED if export else IMPORTED
    add("--output_dir", metavar="DIR", help=f"folder to write (default: {folder})")
    add("--dtype", help="of an adapter's weights: fp32, fp16, bf16; default: as they are")
    add("--local_files_only", action="store_true", help="do not use the network")
    return parser


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Export or import, as the last word of ``program`` says. Returns 0; 2 after a user's error, in one sentence."""
    options = new_parser(program).read(argv)
    with loading():
        import localctl.bridges.layouts  # noqa: F401  # loads torch
    if program.endswith("export"):
        _export(options)
    else:
        _import(options)
    return 0


def _export(options: Namespace) -> None:
    places = options.places
    layouts = [place for place in places if _is_layout(Path(place))]
    if options.list:
        _unused(options, "--list", "format", "output", "output_dir", "dtype", "local_files_only")
        _list(places)
    elif options.output and options.output_dir:
        raise ValueError("Give either --output, the file to write, or --output_dir, its folder; not both.")
    elif options.format is None:
        raise ValueError("Name the format to write, --format; see --help.")
    elif layouts and len(places) > 1:
        raise ValueError(f"{layouts[0]} is a layout; export one layout at a time.")
    elif layouts:
        _unused(options, "a layout", "dtype", "local_files_only")
        _export_layout(Path(places[0]), options)
    else:
        _export_adapters(options)


def _is_layout(path: Path) -> bool:
    if path.suffix.lower() in (".json", ".txt") and not path.exists():  # no hub id
        raise ValueError(f"There is no file {path}; check the path.")
    return path.suffix.lower() == ".json" and path.name != "config.json" and path.is_file()


def _list(places: Sequence[str]) -> None:
    from localctl.adapter_files import list_adapters

    for place in places:
        names = list_adapters(place)
        if not names:
            raise ValueError(f"{place} holds no adapters by name; it may be one itself.")
        print(*(f"{place}/{name}" for name in names), sep="\n")


def _export_layout(path: Path, options: Namespace) -> None:
    from localctl.bridges import export_layout
    from localctl.files import write_bytes
    from localctl.layout_io import load_layout

    target = Path(options.output) if options.output else Path(options.output_dir or EXPORTED) / path.stem
    exported = export_layout(load_layout(path), options.format, target.stem if options.output else target.name)
    main = Path(next(iter(exported.files)))
    if options.output and target.suffix != main.suffix:
        raise ValueError(f"The format {options.format} is written as {main.suffix}; name the output {main}.")
    files = {target.parent / name: content for name, content in exported.files.items()}
    if path.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"The export would replace {path}; choose another --output or --output_dir.")
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, content)
    print(*files, *exported.notes, sep="\n")


def _export_adapters(options: Namespace) -> None:
    from localctl.bridges import bundle_adapters, convert_adapter
    from localctl.bridges.adapters import FOLDERS

    names = [_name(place) for place in options.places]
    common = {"dtype": options.dtype, "local_files_only": options.local_files_only}
    if options.format in FOLDERS:
        if options.output:
            raise ValueError(f"The format {options.format} is a folder; give --output_dir.")
        output = Path(options.output_dir or EXPORTED)
    else:
        stem = "adapters" if options.format == "bundle" else names[0]
        output = Path(options.output or Path(options.output_dir or EXPORTED) / f"{stem}.safetensors")
    if options.format == "bundle":
        if len(set(names)) < len(names):
            raise ValueError(f"Two adapters have the same name ({', '.join(names)}); rename their folders.")
        found = bundle_adapters(dict(zip(names, options.places, strict=True)), output, **common)
    elif len(names) > 1:
        raise ValueError(f"{len(names)} adapters fit into one file as --format bundle alone; export one at a time.")
    else:
        found = convert_adapter(options.places[0], output, options.format, **common)
    print(found.path, *found.notes, sep="\n")


def _name(place: str) -> str:
    """Return a name for an adapter: of a run's folder ``run/adapter`` the run's."""
    path = Path(place)
    path = path.parent if path.name in ("adapter", "t2iadapter") and path.parent.name else path
    return path.stem if path.is_file() else path.name


def _import(options: Namespace) -> None:
    from localctl.jobs.scenes import is_image

    path = Path(options.place).expanduser()
    adapters = ("condition", "base", "mask_resize", "dtype")
    if _is_layout(path) or path.suffix.lower() == ".txt" or is_image(options.place):
        _unused(options, "a layout", *adapters, "split", "local_files_only")
        _save({path.stem: _read_layout(path, options)}, path, options)
    elif any((path / f"{name}{end}").is_file() for name in ("valset", "testset") for end in (".json", ".pkl")):
        _unused(options, "a folder of scenes", *adapters, "prompt", "color", "format", "local_files_only")
        _save(_scenes(path, options), path, options)
    else:
        _unused(options, "an adapter", "prompt", "height", "width", "index", "split", "color")
        _import_adapters(path, options)


def _read_layout(path: Path, options: Namespace) -> Layout:
    from localctl.bridges import import_layout
    from localctl.images import open_image
    from localctl.layout_io import file_inside

    def open_inside(name: str) -> Image.Image:
        return open_image(file_inside(path.parent, name, f"The layout {path}"))

    given = {"prompt": options.prompt, "size": _size(options), "index": options.index, "colors": _colors(options)}
    return import_layout(path.read_bytes(), options.format, images=open_inside, **given)


def _scenes(folder: Path, options: Namespace) -> dict[str, Layout]:
    from localctl.color_maps import dense_diffusion_scenes, from_dense_diffusion

    indices = dense_diffusion_scenes(folder, options.split) if options.index is None else [options.index]
    size, split = _size(options), options.split
    layouts = {}
    for index in indices:
        try:
            layouts[f"scene_{index}"] = from_dense_diffusion(folder, index, size, split)
        except ValueError as error:  # of 250 scenes, one has too few colours
            if options.index is not None:
                raise
            warnings.warn(f"The scene {index} is left out: {error}", stacklevel=2)
    return layouts


def _save(layouts: Mapping[str, Layout], source: Path, options: Namespace) -> None:
    from localctl.layout_io import save_layout

    folder = Path(options.output_dir or IMPORTED)
    folder.mkdir(parents=True, exist_ok=True)
    for name, layout in layouts.items():
        target = folder / f"{name}.json"
        if target.resolve() == source.resolve():
            raise ValueError(f"The import would replace {source}; choose another --output_dir.")
        print(save_layout(layout, target))


def _import_adapters(path: Path, options: Namespace) -> None:
    from localctl.adapter_files import list_adapters
    from localctl.bridges import convert_adapter
    from localctl.bridges.adapters import FOLDERS
    from localctl.messages import nearest

    format = options.format or "local"
    if format not in FOLDERS:
        raise ValueError(
            f"Unknown format {format!r} of an adapter to import; {nearest(format, FOLDERS, 'local or diffusers.')}"
        )
    chosen = {"base": options.base, "mask_resize": options.mask_resize, "condition": _condition(options.condition)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    names = list_adapters(path) if path.is_file() else []
    common: dict[str, Any] = {"dtype": options.dtype, "local_files_only": options.local_files_only}
    for name in names or [""]:
        place = f"{options.place}/{name}" if name else options.place
        found = convert_adapter(place, Path(options.output_dir or IMPORTED) / name, format, **common, **chosen)
        print(found.path, *found.notes, sep="\n")


def _condition(name: str | None) -> dict[str, Any] | None:
    """Return the settings of a condition by its name in the configuration, such as ``paper_canny``."""
    if name is None:
        return None
    from dataclasses import asdict

    from localctl.cli.config import load_config
    from localctl.training.settings import TrainSettings

    return asdict(load_config([f"condition={name}"], TrainSettings).condition)


def _size(options: Namespace) -> tuple[int, int] | None:
    if (options.height is None) != (options.width is None):
        raise ValueError("A layout needs both --height and --width, or neither.")
    return None if options.height is None else (options.height, options.width)


def _colors(options: Namespace) -> dict[Any, str] | None:
    from localctl.jobs.scenes import split_colors

    return None if options.color is None else split_colors(options.color)


def _unused(options: Namespace, kind: str, *names: str) -> None:
    """Raise a ValueError for a flag that has no effect on what is converted."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise ValueError(f"--{name} has no effect on {kind}; leave it out.")
