"""Short trainings of the embedded base: every part learns, stops and resumes exactly, and a pipeline is exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from localctl.micro.scenes import scene
from research.micro_base.__main__ import main, parse
from research.micro_base.clip import contrastive_loss, corrupt, new_clip, new_tokenizer, preprocess, token_ids
from research.micro_base.data import scene_cache
from research.micro_base.loop import LoopConfig, read_weights, train
from research.micro_base.parts import load_tokenizer
from research.micro_base.unet import encode_captions, new_scheduler
from research.micro_base.unet_loss import LatentCache, text_batch
from research.training_loop import learning_rate_at


def test_the_cache_holds_the_scenes(tmp_path: Path) -> None:
    cache = scene_cache(tmp_path, "basic", 6, "val", workers=1)
    again = scene_cache(tmp_path, "basic", 6, "val", workers=1)
    assert np.array_equal(cache.images[5], scene(5, "basic", "val").image)
    assert again.captions == [scene(i, "basic", "val").caption for i in range(6)]
    assert len(cache.head(2)) == 2


def quadratic(target: torch.Tensor):
    model = nn.Linear(4, 1, bias=False)

    def loss_fn(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        x = torch.from_numpy(rng.standard_normal((16, 4), dtype=np.float32))
        return {"loss": (model(x) - x @ target[:, None]).square().mean()}

    return model, loss_fn


def test_the_loop_resumes_exactly(tmp_path: Path) -> None:
    target = torch.tensor([1.0, -2.0, 0.5, 3.0])
    settings = {"learning_rate": 0.3, "warmup": 5, "ema": 0.9, "checkpoint_every": 20}
    results = []
    for name, stops in (("straight", [60]), ("stopped", [20, 40, 60])):
        torch.manual_seed(0)
        weight = torch.randn(1, 4)
        for _ in stops:
            model, loss_fn = quadratic(target)
            model.load_state_dict({"weight": weight.clone()})
            config = LoopConfig(steps=60, **settings)
            if len(stops) > 1:
                config.minutes = 1e-9  # stop after one step and the checkpoint
            done = train(name, model, loss_fn, config, tmp_path)
        while not done:
            model, loss_fn = quadratic(target)
            done = train(name, model, loss_fn, LoopConfig(steps=60, **settings), tmp_path)
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)
    assert (results[0].flatten() - target).abs().max() < 0.5
    assert torch.equal(read_weights(tmp_path / "straight.pt")["weight"], results[0])


def test_a_gradient_that_is_not_finite_stops_the_loop(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="not finite at step 1; the last checkpoint of bad is .*bad.pt"):
        train(
            "bad",
            model,
            lambda step, rng: {"loss": model.weight.sum() * float("nan")},
            LoopConfig(steps=2, learning_rate=1.0),
            tmp_path,
        )
    assert torch.equal(model.weight, before)


def test_the_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate_at(step, 1.0, 100, 10, LoopConfig.final_fraction) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == pytest.approx(1.0) and rates[-1] < 0.03


def test_every_grammar_word_is_one_token_and_any_text_survives() -> None:
    tokenizer = new_tokenizer()
    assert tokenizer.tokenize("a purple hexagon above a brown background") == [
        w + "</w>" for w in ["a", "purple", "hexagon", "above", "a", "brown", "background"]
    ]
    for text in ("zebra", "naïve café", "42!"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.replace(
            " ", ""
        )
    assert len(tokenizer("a red circle", padding="max_length").input_ids) == 77


def test_the_tokenizer_stays_with_the_weights(tmp_path: Path) -> None:
    work, base = tmp_path / "work", tmp_path / "base"
    args = parse(["--workdir", str(work)])
    first = load_tokenizer(args).get_vocab()
    file = work / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids["red</w>"], ids["blue</w>"] = ids["blue</w>"], ids["red</w>"]
    file.write_text(json.dumps(content))
    changed = load_tokenizer(args).get_vocab()
    assert changed != first, "workdir's own is read, not made anew"
    shutil.copytree(work / "tokenizer", base / "tokenizer")
    other = parse(["--workdir", str(tmp_path / "work2"), "--continue_from", str(base)])
    assert load_tokenizer(other).get_vocab() == changed
    (tmp_path / "work3").mkdir()
    (tmp_path / "work3" / "clip.pt").touch()
    with pytest.raises(ValueError, match="without its tokenizer"):
        load_tokenizer(parse(["--workdir", str(tmp_path / "work3")]))


def test_hard_negatives_are_close_but_never_the_caption() -> None:
    rng = np.random.default_rng(0)
    for profile in ("basic", "rich"):
        for i in range(100):
            caption = scene(i, profile).caption
            negative = corrupt(caption, rng)
            assert negative != caption
            changed = sum(a != b for a, b in zip(caption.split(), negative.split(), strict=True))
            assert 1 <= changed <= 2


def test_the_contrastive_loss_ignores_duplicates_and_falls() -> None:
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    model = new_clip(tokenizer)
    scenes = [scene(i) for i in range(8)]
    images = preprocess(np.stack([s.image for s in scenes]))
    ids = token_ids(tokenizer, [s.caption for s in scenes], 32)
    own = torch.eye(8, dtype=torch.bool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(12):
        loss = contrastive_loss(model, images, ids, own)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    everything_is_mine = contrastive_loss(model, images, ids, torch.ones(8, 8, dtype=torch.bool))["loss"]
    assert float(everything_is_mine) < 1e-3


def test_padding_states_are_replaced_behind_the_caption_only() -> None:
    tokenizer = new_tokenizer()
    from research.micro_base.export import text_tower

    tower = text_tower(new_clip(tokenizer))
    states, lengths, rows = encode_captions(
        ["a red circle", "a blue star"], lambda texts: tower(token_ids(tokenizer, texts)).last_hidden_state, tokenizer
    )
    cache = LatentCache(torch.zeros(2, 4, 16, 16), states, lengths, rows)
    assert rows.tolist() == [1, 2] and lengths.tolist() == [1, 4, 4]
    batch = text_batch(cache, rows, torch.ones(2, dtype=torch.bool))
    assert torch.equal(batch[:, :4], states[1:, :4].float())
    assert torch.equal(batch[:, 4:], states[:1, 4:].float().expand(2, -1, -1))
    untouched = text_batch(cache, rows, torch.zeros(2, dtype=torch.bool))
    assert torch.equal(untouched, states[1:].float())


def test_the_schedule_ends_in_noise() -> None:
    assert new_scheduler().alphas_cumprod[-1] < 1e-4


@pytest.mark.slow
def test_all_parts_run_resume_and_export_a_stock_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--workdir", str(tmp_path / "work"), "--output_dir", str(tmp_path / "base"), "--scenes", "34"]
    steps = ["--vae_steps", "2", "--clip_steps", "1", "--unet_steps", "2", "--unet_scenes", "8", "--unet_batch", "2"]
    steps += ["--decoder_steps", "1", "--clip_vision_steps", "1", "--words_steps", "2"]
    assert main([*common, *steps, "--parts", "vae", "clip"]) == 0
    assert main([*common, *steps]) == 0
    config = json.loads((tmp_path / "base" / "vae" / "config.json").read_text())
    assert config["scaling_factor"] != 0.18215
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "base", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (128, 128)
    assert (tmp_path / "base" / "clip" / "model.safetensors").exists()

    (tmp_path / "work2").mkdir()
    (tmp_path / "work2" / "cache").symlink_to(tmp_path / "work" / "cache")  # the images need not be rendered again
    again = ["--workdir", str(tmp_path / "work2"), "--output_dir", str(tmp_path / "base2"), "--scenes", "34"]
    assert main([*again, *steps, "--continue_from", str(tmp_path / "base"), "--parts", "unet", "export"]) == 0
    vaes = [load_file(tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors") for name in ("base", "base2")]
    assert all(torch.equal(vaes[0][k], vaes[1][k]) for k in vaes[0])
    unets = [load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("base", "base2")]
    moved = max(float((unets[0][k].float() - unets[1][k].float()).abs().max()) for k in unets[0])
    assert 0 < moved < 0.05, "two steps from the exported weights, not from new ones"
    late = ["--continue_from", str(tmp_path / "base"), "--parts", "unet", "--unet_minutes", "0.0001"]
    assert main([*again, *steps, *late]) == 2
    assert "were over" in capsys.readouterr().err
