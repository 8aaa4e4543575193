"""The end of a finished run: its adapter written, and uploaded where that is wanted."""

from __future__ import annotations

import tempfile
from pathlib import Path

from localctl.cli.program import working
from localctl.files import remove
from localctl.training.checkpoints import CheckpointError, write_folders
from localctl.training.events import Events
from localctl.training.export import ADAPTER, export, published
from localctl.training.hub import push


def finish(events: Events, own_masks: bool) -> None:
    """Write the adapter with its card, then upload it with ``push_to_hub``. All processes must call; a signal that
    comes meanwhile lets the writing end, and keeps the upload from beginning.

    Raises:
        OSError: the adapter could not be written, and the message says how the training is kept; or not be uploaded.
    """
    state, settings = events.state, events.settings
    failure = ""
    if events.main:
        try:
            with state.averaged(), working("training: exporting"):
                export(state.models, settings, state.step, events.output_dir, events.last, events.references, own_masks)
        except OSError as error:
            failure = str(error)
    if any(state.agree(bool(failure))):
        failure = failure or "The first process could not write the adapter"
        raise OSError(f"{failure}; {_keep_anyhow(events)}.")
    [events.signal] = state.agree(events.interrupt.signal)
    if events.main and settings.push_to_hub:
        if events.signal:
            events.say("Not pushed to the hub, because of the signal; the same command with latest makes up for it.")
        else:
            push(events.output_dir, settings, published(state.step, events.last))


def _keep_anyhow(events: Events) -> str:
    """Where the training is kept when its export failed, as the part of a sentence."""
    try:
        return events.keep()
    except CheckpointError:
        if not events.main:
            return "no checkpoint either"
    place = Path(tempfile.mkdtemp(prefix="localctl-"))
    try:
        with events.state.averaged():
            write_folders(place, {ADAPTER: events.state.models.plain_adapter.save_pretrained})
    except OSError:
        remove(place)
        return f"nor a checkpoint, nor the adapter alone in {place.parent}: this training could not be kept"
    return f"nor a checkpoint, but the adapter alone is kept in {place / ADAPTER}"
