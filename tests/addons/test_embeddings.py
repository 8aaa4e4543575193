"""Learned words: vectors under a word of the prompt, which may be the phrase of a region."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from addon_files import save_word
from safetensors.torch import save_file
from torch import Tensor

from localctl.addons.embeddings import find_embedding, with_embeddings
from localctl.architectures import read_shape
from localctl.control.region_bias import RegionBias
from localctl.layout import Layout, Region
from localctl.pipelines import BaseConfig
from localctl.sampling import generate
from localctl.tokens import positions_of

LAYOUT = Layout("a <toy>, dogs", 64, 64, (Region("a <toy>", (0, 0, 0.5, 1)), Region("dogs", (0.5, 0, 1, 1))))


def images(pipe: Any) -> Tensor:
    bias = RegionBias(strength=0.5)
    return torch.stack(generate(pipe, LAYOUT, bias, 1, num_inference_steps=2, output_type="latent").images)


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_word_is_found_as_a_phrase_and_leaves_no_trace(sd_pipe: Any, tmp_path: Path, vectors: int) -> None:
    file = save_word(tmp_path / "toy.safetensors", 16, vectors=vectors)
    plain, spelled = images(sd_pipe), positions_of(sd_pipe, LAYOUT)
    size = len(sd_pipe.tokenizer)
    with with_embeddings(sd_pipe, [file]):
        found = positions_of(sd_pipe, LAYOUT)
        assert len(found[0]) == 1 + vectors and found != spelled
        learned = sd_pipe.text_encoder.get_input_embeddings().weight[size : size + vectors]
        assert learned.shape == (vectors, 16)
        changed = images(sd_pipe)
    assert (changed - plain).abs().max() > 1e-3
    assert torch.equal(images(sd_pipe), plain) and positions_of(sd_pipe, LAYOUT) == spelled
    assert len(sd_pipe.tokenizer) == size == sd_pipe.text_encoder.config.vocab_size


def test_sdxl_learns_a_word_in_both_encoders(sdxl_pipe: Any, tmp_path: Path) -> None:
    state = {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 16)}
    save_file(state, tmp_path / "toy.safetensors")
    plain = images(sdxl_pipe)
    with with_embeddings(sdxl_pipe, [f"<toy>={tmp_path / 'toy.safetensors'}"]):
        for encoder, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
            vectors = getattr(sdxl_pipe, encoder).get_input_embeddings().weight[-2:]
            torch.testing.assert_close(vectors, state[name])
        assert not torch.equal(images(sdxl_pipe), plain)
    assert torch.equal(images(sdxl_pipe), plain)


def test_words_come_from_the_file_or_its_name_or_are_given(tmp_path: Path) -> None:
    file = save_word(tmp_path / "toy.safetensors", 16)
    assert find_embedding(file).word == "<toy>"
    assert find_embedding(f"cat={file}").place == f"cat={file}"
    (tmp_path / "rate=1").mkdir()
    moved = file.rename(tmp_path / "rate=1" / file.name)
    assert find_embedding(find_embedding(moved).place).place == f"<toy>={moved}"
    assert find_embedding(save_word(tmp_path / "easy.safetensors", 16, "emb_params")).word == "easy"


def test_words_that_cannot_act_are_refused(sd_pipe: Any, sd_folder: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    shape, large = (read_shape(BaseConfig(name=str(folder))) for folder in (sd_folder, sdxl_folder))
    word = find_embedding(save_word(tmp_path / "toy.safetensors", 16))
    word.check(shape, ["a <toy>"])
    with pytest.raises(ValueError, match="'<toy>' is in none of the prompts"):
        word.check(shape, ["a toy"])
    with pytest.raises(ValueError, match="for 1 text encoder but the base has 2"):
        word.check(large, ["<toy>"])
    wide = find_embedding(save_word(tmp_path / "wide.safetensors", 24))
    with pytest.raises(ValueError, match="width 24 but the base's text has 16"):
        wide.check(shape, ["<toy>"])
    with pytest.raises(ValueError, match="cannot be loaded"), with_embeddings(sd_pipe, [wide]):
        pass
    with pytest.raises(ValueError, match="already in tokenizer"), with_embeddings(sd_pipe, [word, word]):
        pass
    assert len(sd_pipe.tokenizer) == sd_pipe.text_encoder.config.vocab_size
    with pytest.raises(ValueError, match="no spaces, unlike 'a toy'"):
        find_embedding(f"a toy={tmp_path / 'toy.safetensors'}")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"is not a learned word \(it holds 2 tensors\)"):
        find_embedding(tmp_path / "two.safetensors")
