"""The settings of the studio's server, checked before anything slow."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from localctl.bases import BaseConfig, DtypeName
from localctl.files import first_line
from localctl.records import Positive, record
from localctl.settings import MODELS, ConditionConfig, ConditionKind

if TYPE_CHECKING:
    from localctl.denoisers.abilities import Abilities

logger = logging.getLogger(__name__)
DEFAULT_PORT = 7860
_LOCAL_NAMES = ("localhost", "localhost.localdomain")


def short_name(place: str) -> str:
    """Return the last part of a place: the page shows no paths of the server."""
    return place.rstrip("/").rsplit("/", 1)[-1][:40]


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine, as seen by its own programs alone."""
    if host in _LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@record()
@dataclass(kw_only=True)
class StudioConfig:
    """One server of the studio; the help of the flag of the same name explains each setting.

    The page chooses among these models and folders only: it never names a path. ValueError for a value of another type,
    and for a server that others can reach without a password.
    """

    base: str = "micro"
    vae: str | None = None
    variant: str | None = None
    revision: str | None = None
    local_files_only: bool | None = None
    dtype: DtypeName = "float32"
    max_sequence_length: Annotated[int, Field(ge=0)] | None = None
    device: str = "auto"
    adapter: list[str] = field(default_factory=list)
    controlnet: list[str] = field(default_factory=list)
    ip_adapter: list[str] = field(default_factory=list)
    ip_adapter_encoder: str | None = None
    lora: list[str] = field(default_factory=list)
    textual_inversion: list[str] = field(default_factory=list)
    condition_model: list[str] = field(default_factory=list)
    condition_detector: str | None = None
    layout_predictor: str | None = None
    runs: str = "outputs"
    host: str = "127.0.0.1"
    port: int | None = None
    auth: str | None = None
    share: bool = False
    allow_anyone: bool = False
    open: bool = False
    time_limit: Positive = 900

    def __post_init__(self) -> None:
        self._check_addons()
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"The port must be from 1 to 65535, not {self.port}.")
        if self.auth is not None:
            user, colon, password = self.auth.partition(":")
            if not (user and colon and password):
                raise ValueError("The login must be USER:PASSWORD, both not empty; give --auth like that.")
        if self.exposed and self.auth is None and not self.allow_anyone:
            raise ValueError(
                f"{self.opened} would let anyone generate images on this machine; give --auth USER:PASSWORD, or "
                "--allow_anyone if that is meant."
            )

    def _check_addons(self) -> None:
        if self.ip_adapter_encoder is not None and not self.ip_adapter:
            raise ValueError("--ip_adapter_encoder is for an --ip_adapter, but there is none; give --ip_adapter.")
        for item in self.condition_model:
            kind, _, place = item.partition("=")
            if kind not in MODELS or not place or self.condition_models[kind] != place:
                raise ValueError(
                    f"--condition_model {item!r} must be KIND=PLACE, each kind once, with one of {', '.join(MODELS)}; "
                    f"for example depth={MODELS['depth']}."
                )
        if self.condition_detector is not None and "pose" not in self.condition_models:
            raise ValueError("--condition_detector finds people for --condition_model pose=PLACE; give that, too.")

    @property
    def condition_models(self) -> dict[str, str]:
        """The models that compute conditions from photos, by kind."""
        parts = (item.partition("=") for item in self.condition_model)
        return {kind: place for kind, _, place in parts}

    def computed(self, kind: str) -> ConditionConfig:
        """Return how a condition of one of the kinds of ``condition_models`` is computed from a photo."""
        detector = self.condition_detector if kind == "pose" else None
        return ConditionConfig(kind=cast(ConditionKind, kind), model=self.condition_models[kind], detector=detector)

    @property
    def run_settings(self) -> dict[str, Any]:
        """The settings of a run of ``sample.py`` that the server, not the page, decides."""
        names = ("base", "vae", "variant", "revision", "local_files_only", "dtype", "max_sequence_length", "device")
        return {name: getattr(self, name) for name in names}

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can reach the host."""
        return not self.host or is_loopback(self.host)

    @property
    def exposed(self) -> bool:
        """Whether others than this machine's users can reach the page."""
        return self.share or not self.is_local

    @property
    def opened(self) -> str:
        """What a server with these settings opens, as the subject of a sentence."""
        if self.share:
            return "A public link through gradio.live (--share)"
        return f"A server on {self.host}, which other machines can reach,"

    @property
    def login(self) -> tuple[str, str] | None:
        """User and password, or None."""
        if self.auth is None:
            return None
        user, _, password = self.auth.partition(":")
        return user, password

    def abilities(self) -> Abilities | None:
        """Return what the base can do; None where its files are not on this machine yet."""
        from localctl.architectures import read_shape
        from localctl.denoisers.abilities import Abilities

        base = BaseConfig(name=self.base, revision=self.revision, local_files_only=True)
        try:
            return Abilities(base, read_shape(base))
        except (ValueError, OSError) as error:
            logger.info(f"the base is not known yet ({first_line(error)}); the canvas begins at 512x512")
            return None

    def check_places(self) -> None:
        """Raise a ValueError for a base, an adapter or an addon that is not there, or for an addon that does not act on
        the base, before the server starts."""
        from localctl.adapter_files import find_adapter
        from localctl.addons.controlnets import find_controlnet
        from localctl.addons.embeddings import find_embedding
        from localctl.addons.ip_adapters import find_ip_adapter
        from localctl.addons.loras import check_names, find_lora
        from localctl.condition_models import load_model
        from localctl.jobs.checks import check_addons_act
        from localctl.layout_predictor.model import load_predictor
        from localctl.pipelines import resolve_base

        here = bool(self.local_files_only)
        resolve_base(self.base, one_file=True)
        if (known := self.abilities()) is not None:
            check_addons_act(known, self)
            known.check_settings(self)
        for place in self.adapter:
            find_adapter(place, here)
        for place in self.controlnet:
            find_controlnet(place, here)
        for place in self.ip_adapter:
            find_ip_adapter(place, self.ip_adapter_encoder, local_files_only=here)
        check_names([find_lora(place, here) for place in self.lora])
        for place in self.textual_inversion:
            find_embedding(place, here)
        for kind in self.condition_models:
            load_model(self.computed(kind), here)
        if self.layout_predictor is not None:
            load_predictor(self.layout_predictor)
        runs = Path(self.runs).expanduser()
        try:
            if runs.exists() and not runs.is_dir():
                raise ValueError(f"--runs must be a folder of runs, but {runs} is a file.")
        except OSError as error:
            raise ValueError(f"--runs {runs} cannot be read ({error.strerror or first_line(error)}).") from error
