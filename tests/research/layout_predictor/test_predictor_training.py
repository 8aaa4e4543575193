"""Training a layout predictor: from a command line to weights, and resuming exactly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from localctl.cli.config import load_config
from localctl.layout_predictor import load_predictor
from localctl.layout_predictor.model import LayoutPredictor
from localctl.lock import FolderLock, start_time
from localctl.training.checkpoints import save_checkpoint
from localctl.training.trackers import read_stats
from research.layout_predictor import train as train_layout_predictor
from research.layout_predictor.captions import Caption, own_caption
from research.layout_predictor.data import MicroLayouts
from research.layout_predictor.learning import likelihood, relation_loss, sample_known, sample_unread
from research.layout_predictor.measure import MeanBox, held_out_captions, judge, predictor_nll
from research.layout_predictor.settings import LayoutTrainSettings
from research.layout_predictor.training import prepare
from research.training_loop import learning_rate_at

ROOT = Path(__file__).parents[3]
TINY = [
    "predictor.width=16", "predictor.hidden=16", "predictor.layers=1", "predictor.buckets=64", "predictor.heads=2",
    "data.count=6", "--train_batch_size", "4", "--max_train_steps", "4", "--validation_steps", "0", "logging_steps=1",
    "--checkpointing_steps", "2", "device=cpu",
]  # fmt: skip


def settings(*argv: str) -> LayoutTrainSettings:
    return load_config([*TINY, *argv], LayoutTrainSettings, name="train_layout_predictor")


def test_trains_from_a_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TINY, "--output_dir", str(tmp_path), "--validation_steps", "4", "--validation_count", "3"]
    assert train_layout_predictor.main(argv) == 0
    out = capsys.readouterr().out
    assert "Done" in out and "relations of 3 sentences hold" in out
    rows = read_stats(tmp_path)
    assert [row["step"] for row in rows if "nll_centre" in row] == [1, 2, 3, 4]
    assert 0 <= rows[-1]["validation/relations"] <= 1
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    (weights,) = (tmp_path / "predictor").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    model = load_predictor(tmp_path)
    assert model.dtype == torch.float32 and model.config["trained_on"] == "micro"
    assert model.predict("a cat above a dog", chunker="rules").regions


def test_a_continued_run_is_the_same_run(tmp_path: Path) -> None:
    whole = prepare(settings(f"output_dir={tmp_path / 'whole'}"))
    assert whole.train() == 0
    part = prepare(settings(f"output_dir={tmp_path / 'part'}"))
    part.train(stop=lambda step: step == 3)
    assert part.step == 3 and not (tmp_path / "part" / "predictor").exists()
    rest = prepare(settings(f"output_dir={tmp_path / 'part'}", "--resume_from_checkpoint", "latest"))
    assert rest.step == 3 and rest.train() == 0
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name
    assert read_stats(tmp_path / "whole") == read_stats(tmp_path / "part")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["predictor.witdh=8"], ["predictor.width"]),
        (["data.name=flickr"], ["flickr", "micro, coco"]),
        (["data.name=coco"], ["data.instances"]),
        (["data.name=coco", "--instances", "missing.json"], ["missing.json"]),
        (["--train_batch_size", "0"], ["train_batch_size"]),
        (["word_dropout=2"], ["word_dropout"]),
        (["captions.rename=2"], ["captions.rename"]),
        (["predictor.heads=3"], ["predictor.heads"]),
        (["--resume_from_checkpoint", "nowhere"], ["nowhere"]),
        (["device=nonsense"], ["nonsense", "cpu"]),
        (["learning_rate=nan"], ["learning_rate"]),
        ([f"output_dir={__file__}/out"], ["be written to"]),
    ],
)
def test_mistakes_end_with_one_sentence_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]
) -> None:
    assert train_layout_predictor.main([*TINY, f"output_dir={tmp_path / 'out'}", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err
    assert not (tmp_path / "out").exists()


def test_an_earlier_run_is_not_overwritten_by_mistake(tmp_path: Path) -> None:
    prepare(settings(f"output_dir={tmp_path}", "--max_train_steps", "2")).train()
    with pytest.raises(ValueError, match="overwrite_output_dir"):
        prepare(settings(f"output_dir={tmp_path}"))
    with pytest.raises(ValueError, match="max_train_steps: 2 -> 4"):
        prepare(settings(f"output_dir={tmp_path}", "--resume_from_checkpoint", "latest"))
    assert prepare(settings(f"output_dir={tmp_path}", "--overwrite_output_dir")).step == 0


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = FolderLock(tmp_path / "run")
    owner = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps({**owner, "pid": os.getppid(), "began": start_time(os.getppid())}))
    assert train_layout_predictor.main([*TINY, "--output_dir", str(tmp_path / "run")]) == 2
    assert "in use by process" in capsys.readouterr().err
    assert train_layout_predictor.main([*TINY, "--output_dir", str(tmp_path / "other")]) == 0
    assert not (tmp_path / "other" / ".lock").exists()


@pytest.mark.parametrize("every", ["0", "2"])
def test_a_disk_that_is_full_at_the_end_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: str
) -> None:
    save, full = LayoutPredictor.save_pretrained, [True]

    def failing(self: LayoutPredictor, folder: Path) -> None:
        if full and self.dtype == torch.float16:
            raise SafetensorError("No space left on device (os error 28)")
        save(self, folder)

    monkeypatch.setattr(LayoutPredictor, "save_pretrained", failing)
    argv = [*TINY, f"output_dir={tmp_path}", "--checkpointing_steps", every]
    with pytest.raises(OSError, match="No space left.*checkpoint-4 holds the whole training"):
        prepare(load_config(argv, LayoutTrainSettings, name="train_layout_predictor")).train()
    assert not (tmp_path / "predictor").exists()
    full.clear()
    assert train_layout_predictor.main([*argv, "--resume_from_checkpoint", "latest"]) == 0
    assert load_predictor(tmp_path)


def test_it_is_saved_before_it_is_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(settings(f"output_dir={tmp_path}", "--validation_steps", "2"))
    monkeypatch.setattr(run, "_validate", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert (tmp_path / "checkpoint-2").is_dir()


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, lambda folder: (folder / "x").touch(), info={"settings": []})
    with pytest.raises(ValueError, match="not a checkpoint of a layout predictor"):
        prepare(settings(f"output_dir={tmp_path}", "--resume_from_checkpoint", "latest"))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_layout_predictor.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "data.instances=null" in out and re.search(r"--stuff +for data\.stuff", out)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate_at(step, 1, 4, 2) for step in range(5)]
    assert rates[:2] == [0.5, 1.0] and rates[2] == 1 and 0 < rates[3] < 1 and rates[4] == pytest.approx(0)


def test_what_is_shown_and_hidden() -> None:
    captions = [own_caption(MicroLayouts("train", 40)[index]) for index in range(40)]
    known = sample_known(captions, 1.0, 0, 5)
    counts = [len(item.spans) for item in captions]
    assert [int(row.sum()) < count for row, count in zip(known, counts, strict=True)] == [True] * 40
    assert all(
        row[:count].any() == (count > 1) and not row[count:].any() for row, count in zip(known, counts, strict=True)
    )
    assert not sample_known(captions, 0.0, 0, 5).any()
    assert torch.equal(known, sample_known(captions, 1.0, 0, 5)) and not torch.equal(
        known, sample_known(captions, 1.0, 0, 6)
    )
    words, names = sample_unread(captions * 10, 0.25, 0.5, 200, 0, 1)
    assert abs(float(words.float().mean()) - 0.25) < 0.02 and abs(float(names.float().mean()) - 0.5) < 0.1


def test_likelihoods_are_of_the_objects_in_only(tmp_path: Path) -> None:
    """The chain rule, computed object by object."""
    model = prepare(settings(f"output_dir={tmp_path}")).model.eval()
    captions = held_out_captions(MicroLayouts("val", 60), 6, "training", 0, 0.11)
    by_hand, total = 0.0, 0
    with torch.no_grad():
        for caption in captions:
            for index in range(len(caption.spans)):
                boxes = torch.from_numpy(caption.boxes).float()[None]
                known = (torch.arange(len(caption.spans)) < index)[None]
                density = model(model.encode([caption.text], [list(caption.spans)]), boxes, known)
                by_hand -= float(density.centre_log_prob(boxes[..., :2])[0, index])
                total += 1
    assert predictor_nll(model, captions)[0] == pytest.approx(by_hand / total, abs=1e-5)
    everything = likelihood(model, captions, torch.zeros(6, max(len(c.spans) for c in captions), dtype=torch.bool))
    assert everything.count == total


def test_the_loss_of_relations_asks_for_the_right_side() -> None:
    caption = Caption("a above b", ((0, 1), (8, 9)), np.full((2, 4), 0.5), ((0, "above", 1),), "plain")
    none = torch.zeros(1, 2, dtype=torch.bool)
    losses = [float(relation_loss(torch.tensor([[[0.9, y], [0.1, 0.5]]]), [caption], none)) for y in (0.2, 0.5, 0.8)]
    assert losses == pytest.approx([0.04859, 0.69315, 3.04859], abs=1e-4)
    assert relation_loss(torch.rand(1, 2, 2), [caption], ~none) == 0


def test_the_mean_box_is_a_gaussian() -> None:
    captions = [own_caption(MicroLayouts("train", 80)[index]) for index in range(80)]
    centre, size = MeanBox.fit(captions).nll(captions)
    boxes = torch.cat([torch.from_numpy(item.boxes) for item in captions])
    normal = torch.distributions.Normal(boxes[:, :2].mean(0), boxes[:, :2].std(0, unbiased=False))
    assert centre == pytest.approx(float(-normal.log_prob(boxes[:, :2]).sum(1).mean()))
    logs = boxes[:, 2:].log()
    normal = torch.distributions.Normal(logs.mean(0), logs.std(0, unbiased=False))
    assert size == pytest.approx(float(-normal.log_prob(logs).sum(1).mean()))


def test_a_judge_reads_the_words_alone(tmp_path: Path) -> None:
    model = prepare(settings(f"output_dir={tmp_path}")).model.eval()
    caption = held_out_captions(MicroLayouts("val", 60), 1, "held_out", 0, 0.11)[0]
    verdict = judge(model, caption)
    assert verdict.parsed and verdict.inside and verdict.overlap < 1e-3 and verdict.relations == len(caption.relations)
    layout = model.predict(caption.text, chunker="rules")
    centres = [((x0 + x1) / 2, (y0 + y1) / 2) for region in layout.regions for x0, y0, x1, y1 in region.boxes]
    (first, side, second), axis = caption.relations[0], caption.relations[0][1] in ("above", "below")
    before = centres[first][axis] < centres[second][axis]
    assert verdict.held == (before == (side in ("left", "above")))


@pytest.mark.slow
def test_the_first_screen_is_clean(tmp_path: Path) -> None:
    """A new process writes nothing but the progress bar on stderr."""
    command = [sys.executable, "-m", "research.layout_predictor.train", *TINY, "--output_dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    noise = [line for line in re.split(r"[\r\n]+", result.stderr) if line.strip() and not line.startswith("training: ")]
    assert noise == [] and "warning" not in result.stdout.lower()
