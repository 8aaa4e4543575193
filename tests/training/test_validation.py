import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_helpers import tiny_settings

from localctl.conditions import ConditionConfig
from localctl.data import BadRow, MicroScenes
from localctl.images import to_pil
from localctl.masks import MaskConfig
from localctl.metrics.edges import MIN_EDGES
from localctl.training.models import load_models
from localctl.training.settings import ValidationConfig
from localctl.training.validation import (
    Fidelity,
    References,
    Validator,
    as_clause,
    choose_cases,
    validation_row,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(sd_folder, tmp_path_factory):
    config = ValidationConfig(count=3, rows=2, batch_size=2, num_inference_steps=2)
    return tiny_settings(sd_folder, tmp_path_factory.mktemp("out"), validation=config)


@pytest.fixture(scope="module")
def validator(settings):
    return Validator(load_models(settings, CPU, None), settings, MicroScenes("val", count=30))


def test_cases_are_held_out_scorable_and_fixed(settings, validator):
    again = Validator(validator.models, settings, MicroScenes("val", count=60))
    assert len(validator.cases) == 3
    for case, other in zip(validator.cases, again.cases, strict=True):
        assert case.example.key.startswith("basic-val-") and case.example.key == other.example.key
        assert torch.equal(case.mask, other.mask)
        assert (case.edges & (case.mask[0].numpy() > 0.5)).sum() >= MIN_EDGES


def test_a_run_can_be_repeated_and_changes_no_weight_or_mode(validator):
    adapter = validator.models.plain_adapter
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    state = torch.random.get_rng_state()
    first, second = validator.run(), validator.run()
    assert first.fidelity == second.fidelity
    assert np.array_equal(np.asarray(first.sheet), np.asarray(second.sheet))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert adapter.training and all(p.requires_grad and p.grad is None for p in adapter.parameters())
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


def test_the_adapter_is_what_is_being_judged(validator):
    first = validator._generate(validator.models.plain_adapter)
    base = validator._generate(None)
    assert any(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in zip(first, base, strict=True))


def test_real_images_score_one_and_flat_ones_zero(validator):
    real = [to_pil(case.example.pixels) for case in validator.cases]
    assert validator._score(real).f1 == 1.0
    flat = [picture.resize((1, 1)).resize(picture.size) for picture in real]
    assert validator._score(flat) == Fidelity(0.0, 0.0, 0.0, (0.0,) * 3)


def test_a_share_of_the_cases_has_no_prompt(settings, validator):
    assert [case.prompt for case in validator.cases] == [case.example.caption for case in validator.cases]
    assert all(case.prompt for case in validator.cases)

    def cases(share, count=3):
        config = replace(settings.validation, proportion_empty_prompts=share, count=count)
        return choose_cases(MicroScenes("val", count=60), replace(settings, validation=config))

    assert not any(case.prompt for case in cases(1.0))
    many = cases(0.5, 30)
    assert 6 <= sum(not case.prompt for case in many) <= 24
    assert [case.prompt for case in many[:10]] == [case.prompt for case in cases(0.5, 10)]  # not by place or count
    silent = replace(settings, validation=replace(settings.validation, proportion_empty_prompts=1.0))
    other = Validator(validator.models, silent, MicroScenes("val", count=30))
    pairs = zip(other._generate(None), validator._generate(None), strict=True)
    assert any(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs)
    assert other.run().sheet


def test_control_takes_part_in_guidance_as_the_settings_say(settings, validator):
    def images(**guidance):
        changed = replace(settings, validation=replace(settings.validation, **guidance))
        other = Validator(validator.models, changed, MicroScenes("val", count=60))
        return [np.asarray(image).tobytes() for image in other._generate(validator.models.plain_adapter)]

    assert settings.validation.guidance_scale == 7.5
    alone = images(unconditional_scale=0.0)
    assert images(unconditional_scale=1.0) != alone == images(control_guidance_scale=7.5)


def test_the_sheet_has_the_four_columns_and_the_asked_rows(validator):
    sheet = validator.run().sheet
    assert 4 * 128 <= sheet.width < 5 * 128 and 2 * 128 <= sheet.height < 3 * 128


def test_control_is_the_share_of_the_way_to_the_ceiling():
    def at(f1):
        return Fidelity(f1, f1, f1, (f1,))

    references = References(at(0.2), at(1.0))
    assert references.control(0.6) == pytest.approx(0.5) and references.control(0.1) < 0
    assert math.isnan(References(at(0.5), at(0.5)).control(0.7))


def test_without_edges_in_any_mask_there_are_images_and_no_score(settings, validator):
    corner = replace(settings, mask=MaskConfig(kind="fixed", box=(0.0, 0.0, 0.02, 0.02)))
    blind = Validator(validator.models, corner, MicroScenes("val", count=5))
    assert len(blind.cases) == 3 and not blind.scored and validator.scored
    result, references = blind.run(), blind.references()
    assert not result.fidelity.scored and len(result.fidelity.per_case) == 3
    assert result.sheet.size == validator.run().sheet.size
    assert "no score" in as_clause(result.fidelity, references) and "40 edge pixels" in as_clause(
        result.fidelity, references
    )
    assert all(math.isnan(value) for value in validation_row(result.fidelity, references).values())


def test_held_out_examples_none_of_which_is_usable_are_an_error(settings, validator):
    class Broken:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise BadRow("image missing", "no image")

    with pytest.raises(ValueError, match="None of the 4 held-out examples is usable.*--validation_steps 0"):
        Validator(validator.models, settings, Broken())


def test_conditions_no_image_yields_are_scored_by_edges(settings):
    depth = replace(settings, condition=ConditionConfig(kind="depth"))
    result = Validator(
        load_models(depth, CPU, None), depth, MicroScenes("val", count=30, condition=depth.condition)
    ).run()
    assert 0 <= result.fidelity.f1 <= 1


def test_it_can_be_given_up_between_any_two_denoising_steps(validator):
    processors = dict(validator.models.network.attn_processors)
    beats = 0

    def count():
        nonlocal beats
        beats += 1

    whole = validator.run(count).sheet
    batches = -(-len(validator.cases) // validator.config.batch_size)
    assert beats == batches * validator.config.num_inference_steps

    def give_up():
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        validator.run(give_up)
    assert validator.models.network.attn_processors == processors
    assert validator.run().sheet.tobytes() == whole.tobytes()
