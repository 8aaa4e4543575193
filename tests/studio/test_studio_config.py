"""What a server may open, and what it refuses before it starts."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from localctl.cli.studio import LOGIN, _with_login, main, new_parser
from localctl.images import MAX_PIXELS
from localctl.studio.config import StudioConfig
from localctl.studio.server import _guarded_decoding


def test_a_server_is_local_by_default() -> None:
    config = StudioConfig()
    assert config.is_local and not config.exposed and config.login is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.0.1", "::1", "[::1]", "localhost"])
def test_loopback_hosts_are_local(host: str) -> None:
    assert not StudioConfig(host=host).exposed


@pytest.mark.parametrize("options", [{"host": "0.0.0.0"}, {"host": "::"}, {"host": "192.168.1.4"}, {"share": True}])
def test_an_open_server_without_login_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="let anyone generate images on this machine; give --auth USER:PASSWORD"):
        StudioConfig(**options)
    assert StudioConfig(**options, auth="me:secret").login == ("me", "secret")
    assert StudioConfig(**options, allow_anyone=True).exposed


@pytest.mark.parametrize("auth", ["me", ":", "me:", ":secret"])
def test_a_login_has_both_parts(auth: str) -> None:
    with pytest.raises(ValueError, match="USER:PASSWORD"):
        StudioConfig(auth=auth)


def test_a_password_may_hold_colons() -> None:
    assert StudioConfig(auth="me:a:b").login == ("me", "a:b")


@pytest.mark.parametrize(
    "changes", [{"port": 0}, {"port": 70000}, {"time_limit": 0}, {"dtype": "float8"}, {"hots": "x"}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        StudioConfig(**changes)


def test_places_are_checked_before_the_server_starts(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        StudioConfig(base=str(tmp_path / "nowhere")).check_places()
    with pytest.raises(ValueError, match="no_adapter"):
        StudioConfig(adapter=[str(tmp_path / "no_adapter")]).check_places()
    for kind in ("controlnet", "ip_adapter", "lora", "textual_inversion"):
        with pytest.raises(ValueError, match="no_addon"):
            StudioConfig(**dict[str, Any]({kind: [str(tmp_path / "no_addon")]})).check_places()
    with pytest.raises(ValueError, match="no layout predictor in .*no_predictor"):
        StudioConfig(layout_predictor=str(tmp_path / "no_predictor")).check_places()
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="is a file"):
        StudioConfig(runs=str(file)).check_places()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition_model": ["canny=x"]}, "--condition_model 'canny=x' must be KIND=PLACE"),
        ({"condition_model": ["depth"]}, "must be KIND=PLACE"),
        ({"condition_model": ["depth=a", "depth=b"]}, "each kind once"),
        ({"condition_detector": "x"}, "give that, too"),
        ({"ip_adapter_encoder": "x"}, "give --ip_adapter"),
    ],
)
def test_models_without_a_use_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudioConfig(**changes)


def test_a_model_of_conditions_is_loaded_before_the_server_starts(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"The model .*no_model of condition=depth cannot be loaded"):
        StudioConfig(condition_model=[f"depth={tmp_path / 'no_model'}"], local_files_only=True).check_places()


def test_every_setting_has_a_flag_of_its_name() -> None:
    flags = {action.dest for action in new_parser()._actions} - {"help"}
    assert flags >= set(vars(StudioConfig()))


def test_the_command_refuses_an_open_server_in_one_sentence(capsys: Any) -> None:
    assert main(["--host", "0.0.0.0"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("app.py: A server on 0.0.0.0") and told.count("\n") == 1


def test_a_login_is_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "login").write_text("me:of-the-file\n")
    for options, login in (
        ({"auth_file": str(tmp_path / "login")}, "of-the-file"), ({}, "of-the-environment"),
        ({"auth": "me:typed"}, "typed"),
    ):  # fmt: skip
        monkeypatch.setenv(LOGIN, "me:of-the-environment")
        assert _with_login(options) == {"auth": f"me:{login}"}
        assert LOGIN not in os.environ  # nor in that of a training that the page starts
    assert _with_login({"port": 1}) == {"port": 1}
    with pytest.raises(ValueError, match="not both"):
        _with_login({"auth_file": str(tmp_path / "login"), "auth": "me:typed"})
    with pytest.raises(ValueError, match="cannot be read"):
        _with_login({"auth_file": str(tmp_path / "none")})
    for text, count in (("\n", 0), ("me:secret\nyou:secret\n", 2)):
        (tmp_path / "login").write_text(text)
        with pytest.raises(ValueError, match=f"must be one line, USER:PASSWORD; it has {count}"):
            _with_login({"auth_file": str(tmp_path / "login")})


def test_a_server_that_has_ended_leaves_pillow_as_it_was() -> None:
    before, pixels = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    with _guarded_decoding():
        assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS and warnings.filters != before
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == (before, pixels)
