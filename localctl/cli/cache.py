"""Encode the images and captions of a dataset once: `localctl cache --encodings_dir FOLDER`, with the flags of the
training to come. That training reads them with the same `--encodings_dir FOLDER`, and loads neither the VAE nor the
text encoders unless it generates validation images.

Works on one machine, with a process per GPU or CPU, or on a Ray cluster (RAY_ADDRESS; FOLDER on a disk that all its
machines see). `--dry_run` estimates disk and time first. A run that was stopped continues when it is started again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.caching.settings import CacheSettings
from localctl.cli.program import explained, one_sentence
from localctl.cli.training_flags import settings_to_run
from localctl.messages import fail, loading
from localctl.signals import exit_code

PROGRAM = "localctl cache"


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Cache encodings as ``argv`` says.

    Returns 0; 2 after a user's error and 1 if a file could not be written, each in one sentence; 130 after SIGINT, 143
    after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = settings_to_run(
        program, argv, CacheSettings, explained(__doc__, program), estimate="localctl.caching.estimate"
    )
    if settings is None:
        return 0
    with loading():
        from localctl.caching.cache import cache

    try:
        result = cache(settings)
    except KeyboardInterrupt:
        fail(program, "interrupted twice; what is encoded stays, the same command goes on from there.")
        return 130
    if result.signal:
        fail(program, "stopped; what is encoded stays, the same command goes on from there.")
        return exit_code(result.signal)
    return 0
