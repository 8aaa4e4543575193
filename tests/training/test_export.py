import os

import pytest
import yaml
from PIL import Image
from training_helpers import tiny_settings

from localctl.bases import BASES
from localctl.cli.config import load_config
from localctl.training.export import Finished, _public_name, model_card, sheet_name, write_settings
from localctl.training.settings import TrainSettings
from localctl.training.validation import Fidelity, References, ValidationResult


def fidelity(f1):
    return Fidelity(f1, f1, f1, (f1, f1))


def test_the_card_carries_grid_and_figures(tmp_path):
    settings = tiny_settings("micro", tmp_path, gradient_accumulation_steps=2)
    result = ValidationResult(fidelity(0.55), Image.new("RGB", (8, 8)))
    card = model_card(Finished(settings, 40, result, References(fidelity(0.1), fidelity(1.0))))
    front, body = card.split("---\n")[1:3]
    meta = yaml.safe_load(front)
    assert "base_model" not in meta and {"t2iadapter", "canny"} <= set(meta["tags"])
    metrics = [metric for result in meta["model-index"][0]["results"] for metric in result["metrics"]]
    figures = {metric["type"]: metric["value"] for metric in metrics}
    assert figures == {"f1": 0.55, "precision": 0.55, "recall": 0.55}
    assert "40 steps" in body and f"({sheet_name(40)})" in body and "50% of the way" in body
    assert "| with the adapter | 0.550 |" in body and "| base alone | 0.100 |" in body and "batch 8" in body
    assert "2 held-out\nexamples" in body
    alone = ValidationResult(Fidelity(0.0999, 0.1, 0.1, (0.0999,)), Image.new("RGB", (8, 8)))
    body = model_card(Finished(settings, 40, alone, References(fidelity(0.1), fidelity(1.0))))
    assert "1 held-out\nexample," in body and "goes 0% of the way" in body  # and not -0%
    compile(body.split("```python\n")[1].split("```")[0], "card", "exec")


@pytest.mark.parametrize(("base", "meant"), [("sd15", BASES["sd15"].id_or_path), ("owner/name", "owner/name")])
def test_a_base_of_the_hub_is_linked(base, meant, tmp_path):
    card = model_card(Finished(tiny_settings(base, tmp_path), 40))
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == meant


def test_a_folder_whose_name_is_no_text_here_is_named_as_utf8(tmp_path, monkeypatch):
    """In a locale of ASCII, Japanese letters are half surrogate pairs, as 0xe9 is in one of UTF-8."""
    for name, shown in ((b"caf\xe9", "caf\ufffd"), ("\u65e5\u672c".encode(), "\u65e5\u672c")):
        base = tmp_path / os.fsdecode(name)
        base.mkdir()
        card = model_card(Finished(tiny_settings(str(base), tmp_path), 40))
        assert f"adapter for {shown}\n" in card and card.encode()
    monkeypatch.setattr("os.fsencode", lambda text: str(text).encode("ascii", "surrogateescape"))
    escaped = "\u65e5\u672c".encode().decode("ascii", "surrogateescape")
    assert _public_name(f"./{escaped}") == "\u65e5\u672c"


def test_a_card_without_validation_claims_nothing(tmp_path):
    card = model_card(Finished(tiny_settings("micro", tmp_path), 40))
    assert "F1" not in card and "validation/" not in card and "model-index" not in card


def test_the_written_settings_are_a_configuration_that_gives_the_same_run(tmp_path):
    settings = load_config(
        ["mask=mixture", "adapter.channels=[8, 16]", "loss.weight=1e-5", "output_dir=a, (b)"], TrainSettings
    )
    write_settings(settings, tmp_path / "config")
    (tmp_path / "config" / "config.yaml").rename(tmp_path / "config" / "train.yaml")
    assert load_config([], TrainSettings, config_dir=tmp_path / "config") == settings
