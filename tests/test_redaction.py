from dataclasses import dataclass, field, replace

import pytest
import yaml

from localctl import redaction
from localctl.cli.config import load_config
from localctl.data import DataConfig
from localctl.records import record
from localctl.redaction import MASKED, flat, recorded
from localctl.training.export import write_settings
from localctl.training.settings import TrainSettings


@record("hub")
@dataclass(kw_only=True)
class Hub:
    token: str | None = None
    repository: str = "me/mine"


@record()
@dataclass(kw_only=True)
class Settings:
    hub: Hub = field(default_factory=Hub)
    api_key: str = "k"
    folder: str = "out"
    sizes: tuple[int, ...] = (1, 2)
    names: tuple[str, ...] = ()


def test_secrets_are_masked_by_name_and_the_rest_is_plain():
    settings = Settings(hub=Hub(token="hf_abc"), api_key="123")
    assert recorded(settings) == {
        "hub": {"token": MASKED, "repository": "me/mine"}, "api_key": MASKED, "folder": "out", "sizes": [1, 2],
        "names": [],
    }  # fmt: skip
    assert recorded(Settings())["hub"]["token"] is None
    assert flat(recorded(settings))["hub.token"] == MASKED and flat({"a": {"b": 1}, "c": {}}) == {"a.b": 1, "c": {}}


def test_a_column_of_keys_is_no_secret():
    settings = TrainSettings(data=DataConfig(path="x", key_column="id"))
    assert recorded(settings)["data"]["key_column"] == "id"


def load(tmp_path, text, *argv):
    (tmp_path / "train.yaml").write_text(text)
    return load_config(argv, Settings, config_dir=tmp_path)


def test_what_comes_from_the_environment_is_used_but_not_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALCTL_TEST_FOLDER", "/private/place")
    text = """
folder: ${oc.env:LOCALCTL_TEST_FOLDER}/runs
hub: {repository: "${folder}"}
names: ["${oc.env:LOCALCTL_TEST_FOLDER}", open]
sizes: [1, 2]
"""
    settings = load(tmp_path, text)
    assert settings.folder == settings.hub.repository == "/private/place/runs"
    assert settings.names == ("/private/place", "open")
    values = recorded(replace(settings, sizes=(3,)))
    assert "private" not in str(values)
    assert values["folder"] == values["hub"]["repository"] == MASKED and values["names"] == [MASKED, "open"]


def test_the_command_line_wins_and_is_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALCTL_TEST_FOLDER", "/private/place")
    settings = load(tmp_path, "folder: ${oc.env:LOCALCTL_TEST_FOLDER}\n", "folder=/here")
    assert recorded(settings)["folder"] == "/here"


def test_a_missing_variable_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="cannot be resolved .*LOCALCTL_NOT_THERE"):
        load(tmp_path, "folder: ${oc.env:LOCALCTL_NOT_THERE}\n")


def test_the_written_settings_of_a_run_carry_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALCTL_TEST_FOLDER", "/private/place")
    (tmp_path / "train.yaml").write_text("output_dir: ${oc.env:LOCALCTL_TEST_FOLDER}\nseed: 5\n")
    settings = load_config([], TrainSettings, config_dir=tmp_path)
    write_settings(settings, tmp_path)
    written = (tmp_path / "config.yaml").read_text()
    assert "/private" not in written and "place" not in written and yaml.safe_load(written)["seed"] == 5


@pytest.mark.parametrize("name", ["key", "api_key", "API_KEY", "hub_token", "aws_secret_access_key", "secret_name"])
def test_secrets_are_known_by_their_names(name):
    assert redaction._plain({name: "x"}) == {name: MASKED}


@pytest.mark.parametrize("name", ["key_column", "keys", "max_tokens", "tokenizer", "keep", "monkey", "passwords_file"])
def test_what_only_sounds_like_a_secret_is_none(name):
    assert redaction._plain({name: "x"}) == {name: "x"}


def test_a_run_can_be_repeated_from_its_key_column(tmp_path):
    settings = load_config(["data=imagefolder", "data.path=x", "data.key_column=id"], TrainSettings)
    write_settings(settings, tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["key_column"] == "id"
