"""Pushing to the hub, with a stand-in for it."""

import types
from fnmatch import fnmatch
from pathlib import Path

import pytest
from training_helpers import silent_run, tiny_settings

from localctl.training import export as hub

TOKEN = "hf_NeverWriteMeDown"


class FakeHub:
    """Records the requests, and the files that would be uploaded."""

    def __init__(self, token=None, error=None):
        self.token, self.error, self.created, self.files = token, error, [], {}

    def create_repo(self, *, repo_id, exist_ok, private):
        self.created.append((repo_id, exist_ok, private))
        if self.error:
            raise self.error
        return types.SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"someone/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        self.repo_id = repo_id
        paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        names = {path.relative_to(folder_path).as_posix(): path for path in paths}
        chosen = {n: p for n, p in names.items() if any(fnmatch(n, pattern) for pattern in allow_patterns)}
        self.files = {name: path.read_bytes() for name, path in chosen.items()}


def test_a_finished_run_is_pushed_with_its_card_and_grid_and_no_token_is_written(sd_folder, tmp_path, monkeypatch):
    hubs = []
    monkeypatch.setattr(hub, "HfApi", lambda token: hubs.append(FakeHub(token)) or hubs[-1])
    settings = tiny_settings(
        sd_folder, tmp_path, max_train_steps=2, validation_steps=2, checkpointing_steps=1, report_to="tensorboard",
        push_to_hub=True, hub_model_id="owner/adapter", hub_token=TOKEN,
    )  # fmt: skip
    silent_run(settings).train()
    (api,) = hubs
    assert (api.token, api.created, api.repo_id) == (TOKEN, [("owner/adapter", True, True)], "owner/adapter")
    assert set(api.files) == {
        "README.md", "config.yaml", "validation/step-000002.png",
        *(f"{kind}/{name}" for kind in ("adapter", "t2iadapter") for name in FILES),
    }  # fmt: skip
    card = api.files["README.md"].decode()
    assert "(validation/step-000002.png)" in card and "| with the adapter |" in card
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.parent.name.startswith("checkpoint") for path in written)
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []


FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def test_the_name_is_the_folders_unless_one_is_given(tmp_path):
    settings = tiny_settings("micro", tmp_path / "my-adapter", push_to_hub=True)
    assert hub.push(tmp_path / "my-adapter", settings, [], FakeHub()) == "someone/my-adapter"


def test_a_hub_out_of_reach_is_one_sentence_that_says_where_the_adapter_is(tmp_path):
    api = FakeHub(error=ConnectionError("no route to host.\nlong trace"))
    settings = tiny_settings("micro", tmp_path, push_to_hub=True, hub_model_id="a/b")
    with pytest.raises(OSError, match=r"is safe in .*could not be pushed to a/b \(no route to host\)") as error:
        hub.push(tmp_path, settings, [], api)
    assert "\n" not in str(error.value) and f"hf upload a/b {tmp_path}" in str(error.value)


def test_a_push_without_a_token_is_refused_before_slow_work(sd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    monkeypatch.setattr("localctl.training.loop.new_state", None)
    with pytest.raises(ValueError, match="push_to_hub needs a token; run `hf auth login`"):
        silent_run(tiny_settings(sd_folder, tmp_path, push_to_hub=True))
    monkeypatch.setattr(hub, "get_token", lambda: "x")
    hub.check_hub(None)


def test_nothing_that_is_uploaded_names_a_path_of_this_machine(sd_folder, tmp_path, monkeypatch):
    """The local card has no path either; the settings with which the adapter finds its base stay local."""
    hubs = []
    monkeypatch.setattr(hub, "HfApi", lambda token: hubs.append(FakeHub(token)) or hubs[-1])
    settings = tiny_settings(
        sd_folder, tmp_path / "out", max_train_steps=1, push_to_hub=True, hub_token=TOKEN, hub_private_repo=False
    )
    silent_run(settings).train()
    (api,) = hubs
    assert api.created == [("out", True, False)] and len(api.files) == 6
    for name, content in api.files.items():
        assert str(tmp_path.parent).encode() not in content and str(sd_folder).encode() not in content, name
    assert str(sd_folder) not in (tmp_path / "out" / "README.md").read_text()
    assert str(sd_folder) in (tmp_path / "out" / "adapter" / "config.json").read_text()
    assert not (tmp_path / "out" / "hub").exists()


def test_a_failed_push_advises_what_uploads_no_log(sd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda token: FakeHub(token, ConnectionError("refused")))
    run = silent_run(tiny_settings(sd_folder, tmp_path, max_train_steps=1, push_to_hub=True, hub_token=TOKEN))
    with pytest.raises(OSError, match=r"hf upload .*/hub \. --private`"):
        run.train()
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"README.md", "config.yaml", "adapter", "t2iadapter"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/bases/my base", "my base"), ("~/base", "base"), ("C:\\data\\me", "me"),
        ("runwayml/sd-v1-5", "runwayml/sd-v1-5"),
        (["/a/b", 3, None], ["b", 3, None]), ({"x": {"y": "../c/d"}}, {"x": {"y": "d"}}), ("a / b", "a / b"),
    ],
)  # fmt: skip
def test_of_a_path_the_last_part_is_shown(value, shown):
    assert hub.without_paths(value) == shown
