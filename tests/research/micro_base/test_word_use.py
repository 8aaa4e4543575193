"""Whether a base uses the words of a caption."""

import pytest
import torch

from localctl.micro.scenes import COLORS, SHAPES
from localctl.pipelines import BaseConfig, load_pipeline
from research.harness import first_scenes
from research.micro_base import word_errors
from research.micro_base.word_errors import caption, predictions, shares_of_words, use_of_words
from research.micro_base.word_use import main


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(BaseConfig(name="micro"))


def test_captions_name_what_is_there():
    for item in first_scenes(3, lambda item: len(item.objects) == 1):
        thing = item.objects[0]
        assert len(item.objects) == 1 and thing.phrase in caption(item) and item.background in caption(item)
        other = next(color for color in COLORS if color != thing.color)
        changed = caption(item, color=other)
        assert f"{other} {thing.shape} on" in changed and item.background in changed and thing.color not in changed


def test_colours_are_told_apart_and_a_base_that_ignores_text_is_detected(pipe, monkeypatch):
    monkeypatch.setattr(word_errors, "WORDS", {"color": word_errors.WORDS["color"]})
    scenes = first_scenes(6, lambda item: len(item.objects) == 1)
    use = use_of_words(pipe, scenes, 400)["color"]
    assert use.told_apart.value >= 0.5 and use.worse.value > 0.1
    first, _ = predictions(pipe, scenes[0], [caption(scenes[0])] * 2, 400)
    assert first.shape == (2,) and torch.allclose(first[0], first[1], rtol=1e-4)

    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda x, t, states, **more: forward(x, t, states * 0, **more))
    assert abs(use_of_words(pipe, scenes[:2], 400)["color"].worse.value) < 1e-4


def test_shares_of_words_are_of_the_states(pipe, monkeypatch):
    shares = shares_of_words(pipe)
    assert min(shares.values()) > 0.05 and sum(shares.values()) <= 1.0 + 1e-6
    shape = pipe.tokenizer.convert_tokens_to_ids("ring</w>")
    ids = [pipe.tokenizer.convert_tokens_to_ids(name + "</w>") for name in SHAPES]
    states = pipe.text_encoder.forward

    def without_shapes(tokens, *more):
        return states(tokens.masked_fill(torch.isin(tokens, torch.tensor(ids)), shape), *more)

    monkeypatch.setattr(pipe.text_encoder, "forward", without_shapes)
    assert shares_of_words(pipe)["shape"] < 1e-6


def test_bad_input_is_one_sentence(capsys):
    assert main(["--timesteps", "1000"]) == 2
    assert "between 0 and 999" in capsys.readouterr().err
