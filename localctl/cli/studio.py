"""Open the studio, a web page: paint regions and masks, generate images, take them away with their record.

  python app.py
  python app.py --base sd15 --adapter runs/canny --open
  python app.py --host 0.0.0.0 --auth_file login.txt

The page is on this machine alone (127.0.0.1) unless --host or --share says otherwise, and then asks for a login: that
of --auth_file, of the environment variable LOCALCTL_AUTH, or of --auth, which other users of this machine can read in
the list of its processes.
The page can use the models named here and no others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localctl.bases import BASES, DTYPE_NAMES
from localctl.cli.arguments import Arguments
from localctl.cli.program import explained, one_sentence
from localctl.messages import loading

PROGRAM = "app.py"
LOGIN = "LOCALCTL_AUTH"  # USER:PASSWORD, in the environment


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Serve the page until Ctrl+C. Returns 0; 2 after a mistake of the user, with one sentence on stderr."""
    options = new_parser(explained(__doc__, program), program).read(sys.argv[1:] if argv is None else argv)
    with loading():
        from localctl.studio.config import StudioConfig

        config = StudioConfig(**_with_login(vars(options)))
        try:
            from localctl.studio.server import serve
        except ImportError as error:
            way_out = 'run `pip install "localctl[studio]"`'
            raise ValueError(f"The studio needs Gradio ({error}); {way_out}.") from error
    serve(config)
    return 0


def _with_login(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the login of ``--auth_file`` or of the environment, where ``--auth`` gives none.

    ValueError for a file that cannot be read, or two logins.
    """
    place = options.pop("auth_file", None)
    login = os.environ.pop(LOGIN, None)  # processes that are started later do not inherit it
    if place is None:
        return {"auth": login, **options} if login else options
    if "auth" in options:
        raise ValueError("Give either --auth or --auth_file, not both.")
    try:
        login = Path(place).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"The --auth_file {place} cannot be read ({error}); give a file with USER:PASSWORD."
        ) from error
    if len(login.splitlines()) != 1:
        raise ValueError(f"The --auth_file {place} must be one line, USER:PASSWORD; it has {len(login.splitlines())}.")
    return {**options, "auth": login}


def new_parser(description: str | None = None, program: str = PROGRAM) -> Arguments:
    """Return the parser of all flags; the namespace has only flags that were given."""
    parser = Arguments(program, description, argument_default=argparse.SUPPRESS)
    add = parser.add_argument_group("models", "what the page may use").add_argument
    add("--base", help=f"{', '.join(BASES)}, a folder, a hub id or a file of weights (default: micro)")
    add("--adapter", nargs="+", metavar="PLACE", help="trained (or plain T2I-) adapters")
    add("--controlnet", nargs="+", metavar="PLACE", help="ControlNets")
    add("--ip_adapter", nargs="+", metavar="PLACE", help="IP-Adapters")
    add("--ip_adapter_encoder", metavar="PLACE", help="image encoder; default: image_encoder beside the file or above")
    add("--lora", nargs="+", metavar="PLACE", help="LoRA weights")
    add("--textual_inversion", nargs="+", metavar="PLACE", help="learned embeddings")
    add("--condition_model", nargs="+", metavar="KIND=PLACE", help="models that compute depth, pose ... from photos")
    add("--condition_detector", metavar="PLACE", help="detector of people for pose; default: the one of sample.py")
    add("--layout_predictor", metavar="DIR", help="your own layout predictor; default: the one in the package")
    add("--runs", metavar="DIR", help="folder of training runs, for the tab Training (default: outputs)")
    add("--vae", metavar="PLACE", help="another VAE: a diffusers folder or a hub id")
    add("--variant", help="variant of the base's files, such as fp16")
    add("--revision", help="revision of the base on the hub")
    add("--local_files_only", action="store_true", help="never ask the network for models")
    add("--dtype", choices=DTYPE_NAMES, help="default: float32")
    words = "tokens of T5's or Qwen's that a transformer reads (default: its pipeline's)"
    add("--max_sequence_length", type=int, metavar="N", help=words)
    add("--device", help="auto (default), cpu, cuda, ...")
    add = parser.add_argument_group("server").add_argument
    add("--host", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, help="default: 7860, or the next free one")
    add("--auth", metavar="USER:PASSWORD", help="ask for a login; visible in the list of processes")
    add("--auth_file", metavar="FILE", help=f"file with USER:PASSWORD; or set {LOGIN} in the environment")
    add("--share", action="store_true", help="also open a public link through gradio.live; needs --auth")
    add("--allow_anyone", action="store_true", help="let --share or --host do without --auth")
    add("--open", action="store_true", help="open the page in the browser")
    add("--time_limit", type=int, metavar="SECONDS", help="stop a job after this time (default: 900)")
    return parser
