"""Whether a base uses the relation of two objects, and a training that teaches it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from localctl.micro.scenes import RELATIONS
from localctl.micro.shapes import BACKGROUNDS, COLORS
from localctl.pipelines import BaseConfig, load_pipeline
from research.harness import first_scenes
from research.micro_base.__main__ import main
from research.micro_base.clip import new_clip, new_tokenizer, token_ids
from research.micro_base.export import export, text_tower
from research.micro_base.focus import Focus, expected_latents, focus_loss, make_focus
from research.micro_base.loop import LoopConfig
from research.micro_base.objects import roles_of
from research.micro_base.relations import caption, changes, is_related, lines, places_of, probe, use_of_relations
from research.micro_base.roles import train_roles, with_roles
from research.micro_base.unet import new_scheduler, new_unet
from research.micro_base.unet_loss import LatentCache, Recipe, Sampled, UNetLoss
from research.micro_base.vae import new_vae
from research.micro_base.word_use import main as word_use
from research.micro_base.words import word_directions

PAIR = (("red", "circle"), ("blue", "star"))


def test_positions_are_those_of_the_words() -> None:
    tokenizer = new_tokenizer()
    for relation in RELATIONS:
        text = caption(PAIR, relation, "black")
        words = [
            token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(token_ids(tokenizer, [text])[0])
        ]
        found = [words[place] for place in places_of(relation).values()]
        word = next(name for name in relation.split() if name in ("left", "right", "above", "below"))
        assert found == ["circle", word, "blue", "star", "<|endoftext|>", "<|endoftext|>"]
        first, relation_place, second, name = roles_of(text) or (0, 0, 0, "")
        assert (words[first], words[relation_place], words[second], name) == ("red", word, "blue", word)
    for text in ("a red circle and a blue star", "a red circle above a cat", "left of a red circle a blue star", ""):
        assert roles_of(text) is None


def test_a_probe_finds_what_is_in_the_states() -> None:
    random = torch.Generator().manual_seed(0)
    states, classes = torch.randn(400, 8, generator=random), torch.randint(2, (400,), generator=random)
    assert 0.3 < probe(states, classes, 100) < 0.7
    states[:, 3] += 6 * classes
    assert probe(states, classes, 100) > 0.97


def test_each_change_is_of_one_kind() -> None:
    for item in first_scenes(4, is_related):
        texts = changes(item)
        assert len(set(texts.values())) == 4 and item.caption.split(" on ")[0] == texts["true"].split(" on ")[0]
        (red, _), (blue, _) = ((o.color, o.shape) for o in item.objects)
        assert texts["colours"].split()[1] == blue and red in texts["colours"]
        word, other = roles_of(texts["true"]), roles_of(texts["relation"])
        assert word and other and word[3] != other[3] and texts["true"].replace(word[3], other[3]) == texts["relation"]


def test_the_change_of_a_prediction_is_that_of_the_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load_pipeline(BaseConfig(name="micro"))
    scenes = first_scenes(2, is_related)
    assert use_of_relations(pipe, scenes, 800)["background"][2].value > 0.3
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda x, t, states, **more: forward(x, t, states * 0, **more))
    assert all(figures[2].value < 1e-4 for figures in use_of_relations(pipe, scenes, 800).values())


def test_flags_that_do_not_act_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert word_use(["--guidance_scale", "2"]) == 2
    assert "--relations" in capsys.readouterr().err
    assert main(["--denoiser", "transformer", "--output_dir", "somewhere", "--parts", "roles"]) == 2
    assert "--parts roles does not act" in capsys.readouterr().err
    assert main(["--unet_mix", "0.5", "0.3", "0.1", "--unet_relations", "0.2"]) == 2
    assert "add up to at most 1" in capsys.readouterr().err


def test_roles_are_mixed_into_the_words_of_related_objects_alone() -> None:
    states = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    sides = word_directions(4, torch.arange(4), 16)
    roles = [roles_of("a red circle above a blue star"), None]
    mixed = with_roles(states, roles, sides)
    changed = (mixed != states).any(-1)
    assert changed[0].nonzero().flatten().tolist() == [4, 6, 7] and not changed[1].any()
    assert torch.allclose(mixed[0, 6:8].norm(dim=-1), states[0, 6:8].norm(dim=-1), atol=1e-5)
    told = torch.nn.functional.cosine_similarity(mixed[0, [4, 6]][:, None], sides[None], dim=-1)
    assert told.argmax(1).tolist() == [2, 3], "the first is above, the second below"
    subject = states[0, 2:4].mean(0)
    assert torch.cosine_similarity(mixed[0, 4], subject, dim=0) > torch.cosine_similarity(states[0, 4], subject, dim=0)


def test_expected_latents_are_the_mean_of_their_captions() -> None:
    random = torch.Generator().manual_seed(0)
    backgrounds, sides = torch.randn(len(BACKGROUNDS), 4, 16, 16, generator=random), torch.randn(4, 8, 4, 16, 16)
    texts, latents, means = [], [], []
    for _ in range(600):
        one, two, relation, background = (
            int(torch.randint(n, (), generator=random)) for n in (8, 8, 4, len(BACKGROUNDS))
        )
        pair = (list(COLORS)[one], "ring"), (list(COLORS)[two], "cross")
        texts.append(caption(pair, RELATIONS[relation], list(BACKGROUNDS)[background]))
        means.append(backgrounds[background] + sides[relation, one] + sides[relation ^ 1, two])
        latents.append(means[-1] + 0.3 * torch.randn(4, 16, 16, generator=random))
    texts += ["a red ring", "a red ring above a blue ring"]
    every = torch.stack([*latents, latents[0], latents[1]])
    expected = expected_latents(every, texts)
    assert float((expected[:600] - torch.stack(means)).square().mean()) < 0.3**2 / 5
    assert torch.equal(expected[600:], every[600:]), "other captions have no mean"


def test_means_are_the_target_where_the_noise_hides_the_scene() -> None:
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=random)
    states = torch.randn(2, 77, 128, generator=random)
    cache = LatentCache(latents, states, torch.tensor([1, 9]), torch.ones(2, dtype=torch.long))
    expected = torch.stack([latents[0] * 0, latents[1]])  # the second scene has no mean
    masks, odds = torch.ones(2, 3, 16, 16), torch.full((2,), 0.5)
    focus = Focus(masks, masks.amax(1), torch.full((2, 3), -1), torch.full((2,), -1), odds, expected)
    loss = UNetLoss(new_unet(), cache, new_scheduler().alphas_cumprod, Recipe(), focus)
    no = torch.zeros(2, dtype=torch.bool)
    for timestep, empty, means in ((900, no, [True, False]), (900, ~no, [False] * 2), (800, no, [False] * 2)):
        sampled = Sampled(torch.arange(2), empty, torch.zeros_like(latents), torch.full((2,), timestep), no)
        _, target, weight = loss.predict(latents, sampled, states)
        own = -((1 - new_scheduler().alphas_cumprod[timestep]) ** 0.5) * latents
        assert [bool(torch.allclose(t, torch.zeros_like(t))) for t in target] == means
        assert all(torch.allclose(t, o, atol=1e-5) for t, o, mean in zip(target, own, means, strict=True) if not mean)
        assert (weight > 1).tolist() == means


def test_the_word_of_a_relation_is_one_of_the_first_objects() -> None:
    masks = torch.zeros(1, 3, 16, 16)
    masks[0, 0, :8], masks[0, 1, 8:] = 1, 1
    attention = torch.zeros(1, 256, 10)
    attention[0, :128, 4], attention[0, 128:, 6] = 1, 1
    tokens, weight = torch.tensor([[2, 6, -1]]), torch.ones(1)
    _, share = focus_loss([attention], masks, tokens, torch.tensor([4]), weight)
    _, without = focus_loss([attention], masks, tokens, torch.tensor([-1]), weight)
    assert float(share) == pytest.approx(1.0) and float(without) == pytest.approx(0.5)


def test_scenes_with_a_relation_are_sampled_as_often_as_asked(tmp_path: Path) -> None:
    plain, focus = (make_focus(40, tmp_path / "focus.pt", (0.2, 0.2, 0.2), related=r) for r in (0.0, 0.4))
    related = focus.relations >= 0
    assert 0 < related.sum() < 40 and (plain.relations == -1).all()
    assert float(focus.odds[related].sum()) >= 0.4 > float(plain.odds[related].sum())


def test_a_text_encoder_of_its_own_is_trained_exported_and_continued_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    tokenizer, base = new_tokenizer(), tmp_path / "base"
    export(base, new_vae(), new_clip(tokenizer), tokenizer, new_unet())
    common = ["--workdir", str(tmp_path / "work"), "--scenes", "40", "--roles_steps", "2", "--continue_from"]
    second = tmp_path / "second"
    assert main([*common, str(base), "--parts", "roles", "export", "--output_dir", str(second)]) == 0
    encoders = [load_file(folder / "text_encoder" / "model.safetensors") for folder in (base, second)]
    assert any(not torch.equal(encoders[0][name], encoders[1][name]) for name in encoders[0])
    clips = [load_file(folder / "clip" / "model.safetensors") for folder in (base, second)]
    assert all(torch.equal(clips[0][name], clips[1][name]) for name in clips[0]), "the CLIP keeps its own tower"
    assert "The text encoder is" not in capsys.readouterr().out
    assert main([*common, str(base), "--parts", "export", "--output_dir", str(tmp_path / "again")]) == 0
    assert "The text encoder is" in capsys.readouterr().out
    third, work = tmp_path / "third", ["--workdir", str(tmp_path / "work2")]
    assert main([*work, "--continue_from", str(second), "--parts", "export", "--output_dir", str(third)]) == 0
    kept = load_file(third / "text_encoder" / "model.safetensors")
    assert all(torch.equal(kept[name], encoders[1][name]) for name in kept)


def test_the_text_tower_of_the_clip_is_tuned_only_where_the_unet_has_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer, base = new_tokenizer(), tmp_path / "base"
    clip, other = new_clip(tokenizer), text_tower(new_clip(tokenizer))
    for text, moves in ((None, False), (other, True)):
        export(base, new_vae(), clip, tokenizer, new_unet(), text=text)
        work = ["--workdir", str(tmp_path / f"work_{moves}"), "--scenes", "40", "--continue_from", str(base)]
        out = ["--parts", "clip_vision", "export", "--clip_vision_steps", "2", "--output_dir", str(tmp_path / "out")]
        assert main([*work, *out]) == 0
        before, after = (load_file(folder / "clip" / "model.safetensors") for folder in (base, tmp_path / "out"))
        changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert "vision_model" in changed and ("text_model" in changed) == moves
        texts = [load_file(folder / "text_encoder" / "model.safetensors") for folder in (base, tmp_path / "out")]
        assert all(torch.equal(texts[0][name], texts[1][name]) for name in texts[0])


@pytest.mark.slow
def test_the_states_tell_the_sides_after_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    tower = text_tower(new_clip(tokenizer))
    colors = [(a, b) for a in list(COLORS)[:4] for b in list(COLORS)[:4] if a != b]
    texts = [caption(((a, "circle"), (b, "star")), r, "black") for a, b in colors for r in RELATIONS[:2]]
    ids = token_ids(tokenizer, texts, 20)
    place = places_of(RELATIONS[0])["second object's shape"]

    def share() -> float:
        states = tower(ids).last_hidden_state[:, place].detach().unflatten(0, (len(colors), 2))
        return float(states.mean(0).var(0, correction=0).sum() / states.flatten(0, 1).var(0, correction=0).sum())

    before = share()
    config = LoopConfig(steps=80, learning_rate=3e-3, warmup=10, weight_decay=0.0)
    assert train_roles(tower, tokenizer, texts, config, tmp_path, batch=16)
    assert share() > before + 0.2


@pytest.mark.slow
def test_the_embedded_base_is_measured() -> None:
    found = list(lines("micro", 2, [900], [2.0]))
    assert len(found) == 1 + 2 * 6 + 1 + 3 + 1 and found[-1].startswith("guidance 2: both")
