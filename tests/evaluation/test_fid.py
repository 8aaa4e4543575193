"""evaluate_fid.py from end to end on a tiny base, after being killed, and with bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from process_helpers import start, wait_for
from set_helpers import SIDE, contents

import localctl.evaluation.generated_set
from localctl.adapter import LocalAdapter
from localctl.cli import evaluate_fid
from localctl.evaluation.generated_set import read_speed
from localctl.evaluation.provenance import FEATURES, REQUIRED, check_provenance
from localctl.images import load_image
from localctl.metrics.statistics import Statistics

pytest_plugins = ["evaluation_fixtures"]


def test_reference_is_of_the_photos_and_made_once(
    arguments: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*arguments, "num_images=100"]
    assert evaluate_fid.main(["ref", *arguments]) == 0
    assert "unusable (7.png: image" in capsys.readouterr().out
    made = Statistics.load(tmp_path / "fid" / "ref_micro_clip.npz")
    assert made.provenance["bad_rows"] == 1 and made.n == made.provenance["examples"] - 1
    assert made.provenance["image_size"] == [SIDE, SIDE] and len(made.provenance["weights_sha256"]) == 64
    assert made.provenance["data"]["path"] == str(photos)
    assert evaluate_fid.main(["ref", *arguments]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert evaluate_fid.main(["ref", *arguments, "data.center_crop=false"]) == 2
    assert "holds statistics with another data;" in capsys.readouterr().err


def test_a_part_of_one_photo_is_no_reference(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["ref", *arguments, "part=val", "data.validation_share=1e-9"]
    assert evaluate_fid.main(argv) == 2
    error = capsys.readouterr().err
    assert "has 1 example" in error and "raise data.validation_share, or set part=train" in error
    assert evaluate_fid.main([*argv, "data.validation_share=0"]) == 2
    error = capsys.readouterr().err
    assert "data.validation_share=0" in error and "--validation_steps" not in error


def test_generating_after_kills_ends_with_the_same_bytes(
    arguments: list[str], adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*arguments, adapter, "prompts=both"]
    assert evaluate_fid.main(["gen", *arguments]) == 0
    whole = contents(tmp_path / "fid")
    assert len([name for name in whole if "/images/" in name]) == 10
    first = [np.asarray(load_image(tmp_path / "fid" / f"{n}_prompts/images/000000.png")) for n in ("with", "without")]
    assert not np.array_equal(*first)
    again = [*arguments, f"output_dir={tmp_path / 'again'}"]
    write, limit = localctl.evaluation.generated_set.write_bytes, {"left": 0}

    class Killed(BaseException):
        pass

    def write_until_killed(path: Path, content: bytes) -> None:
        limit["left"] -= 1
        if limit["left"] < 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.99").write_bytes(content[:7])
            raise Killed
        write(path, content)

    monkeypatch.setattr(localctl.evaluation.generated_set, "write_bytes", write_until_killed)
    for writes in (1, 4):
        limit["left"] = writes
        with pytest.raises(Killed):
            evaluate_fid.main(["gen", *again])
    monkeypatch.setattr(localctl.evaluation.generated_set, "write_bytes", write)
    assert evaluate_fid.main(["gen", *again]) == 0
    after = {name: data for name, data in contents(tmp_path / "again").items() if not Path(name).name.startswith(".")}
    assert after == whole
    calls: list[Any] = []
    monkeypatch.setattr(localctl.evaluation.generated_set, "load_pipeline", lambda *a, **k: calls.append(a))
    assert evaluate_fid.main(["gen", *again]) == 0 and not calls  # complete: nothing is loaded


def test_two_kills_change_neither_images_nor_scores(arguments: list[str], adapter: str, tmp_path: Path) -> None:
    arguments = [*arguments, adapter, f"reference={tmp_path / 'ref.npz'}"]
    again = [*arguments, f"output_dir={tmp_path / 'again'}"]
    assert evaluate_fid.main(["ref", *arguments, "num_images=100"]) == 0
    for command in ("gen", "score"):
        assert evaluate_fid.main([command, *arguments]) == 0

    images = tmp_path / "again" / "with_prompts" / "images"
    for wanted in (1, 3):
        process = start(evaluate_fid.main, ["gen", *again])
        wait_for(lambda n=wanted: images.is_dir() and len(list(images.glob("[0-9]*.png"))) >= n, process, 100)
        process.kill()
        process.join()
    for command in ("gen", "score"):
        assert evaluate_fid.main([command, *again]) == 0
    one, other = contents(tmp_path / "fid"), contents(tmp_path / "again")
    assert {name: data for name, data in other.items() if not Path(name).name.startswith(".")} == one


def test_processes_share_the_batches(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate_fid.main(["gen", *arguments]) == 0
    one = contents(tmp_path / "fid")
    shutil.rmtree(tmp_path / "fid")
    monkeypatch.setenv("WORLD_SIZE", "2")
    counts = []
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert evaluate_fid.main(["gen", *arguments]) == 0
        counts.append(len(list((tmp_path / "fid" / "with_prompts" / "images").iterdir())))
    assert counts == [2, 5] and contents(tmp_path / "fid") == one


def test_the_speed_of_generating_is_recorded(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_fid.main(["gen", *arguments]) == 0
    folder = tmp_path / "fid" / "with_prompts"
    speed = read_speed(folder)
    assert speed is not None and str(speed) in capsys.readouterr().out and "images/s (batches of 2, cpu)" in str(speed)
    noted = [json.loads(p.read_text()) for p in (folder / "timing").iterdir()]
    assert sorted(n["pictures"] for n in noted) == [1, 2, 2]
    assert speed.images_per_second == pytest.approx(5 / sum(n["seconds"] for n in noted))
    shutil.rmtree(folder / "timing")
    assert read_speed(folder) is None


@pytest.mark.slow
def test_two_processes_measure_as_one(arguments: list[str], adapter: str, tmp_path: Path) -> None:
    arguments = [*arguments, adapter, "prompts=both"]
    assert evaluate_fid.main(["gen", *arguments]) == 0
    reference, folder = tmp_path / "fid" / "ref_micro_clip.npz", tmp_path / "fid" / "with_prompts"
    made = []
    worker, root = Path(__file__).with_name("fid_worker.py"), Path(__file__).parents[2]
    for count in (1, 2):
        reference.unlink(missing_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        call = [*command, str(worker), str(tmp_path), *arguments, "num_images=5"]
        subprocess.run(call, check=True, env=environment, timeout=600)
        made.append((Statistics.load(reference), json.loads((folder / "score_micro_clip.json").read_text())))
    # five images in batches of two, of the reference and of two sets
    ranks = [(tmp_path / f"rank_{rank}_of_2.txt").read_text().split() for rank in (0, 1)]
    assert [list(map(int, rank)) for rank in ranks] == [[2, 1, 2, 1, 2, 1], [2, 2, 2]]
    (one, scores), (two, again) = made
    assert np.array_equal(one.counts, two.counts) and np.array_equal(one.kept, two.kept)
    np.testing.assert_allclose(two.products, one.products, rtol=1e-12)
    assert one.provenance == two.provenance and one.n == 5
    assert again["values"] == pytest.approx(scores["values"], rel=1e-9)
    assert again["provenance"] == scores["provenance"]


def test_one_example_many_times(arguments: list[str], tmp_path: Path) -> None:
    assert evaluate_fid.main(["gen", *arguments, "sample=3.png", "num_images=3"]) == 0
    folder = tmp_path / "fid" / "with_prompts"
    records = [json.loads(p.read_text()) for p in sorted((folder / "ids").iterdir())]
    assert {r["key"] for r in records} == {"3.png"} and len({r["seed"] for r in records}) == 3
    assert len({p.read_bytes() for p in (folder / "masks").iterdir()}) == 1
    assert len({p.read_bytes() for p in (folder / "images").iterdir()}) == 3


def test_score_says_everything_about_itself(
    arguments: list[str], adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*arguments, adapter]
    assert evaluate_fid.main(["ref", *arguments, "num_images=100"]) == 0
    assert evaluate_fid.main(["gen", *arguments]) == 0
    capsys.readouterr()
    assert evaluate_fid.main(["score", *arguments]) == 0
    assert "warning: with_prompts  frechet_micro_clip" in capsys.readouterr().out
    content = json.loads((tmp_path / "fid" / "with_prompts" / "score_micro_clip.json").read_text())
    names = {"frechet", "kid", "kid_error", "cmmd", "split_half", "clip_score"}
    assert set(content["values"]) == {f"{name}_micro_clip" for name in names}
    check_provenance("score", content)
    assert content["provenance"]["n_fake"] == 5 and content["provenance"]["mask_protocol"]["mask"]["kind"] == "box"
    for name in REQUIRED + FEATURES:
        cut = {**content, "provenance": {k: v for k, v in content["provenance"].items() if k != name}}
        with pytest.raises(ValueError, match=f"does not record its {name};"):
            check_provenance("score", cut)
    first = (tmp_path / "fid" / "with_prompts" / "score_micro_clip.json").read_bytes()
    assert evaluate_fid.main(["score", *arguments]) == 0
    assert (tmp_path / "fid" / "with_prompts" / "score_micro_clip.json").read_bytes() == first
    images = tmp_path / "fid" / "with_prompts" / "images"
    problems = [
        (lambda: (images / "000002.png").unlink(), "1 of 5 images in .* are missing .such as 000002.; run gen again"),
        (lambda: Image.new("RGB", (SIDE, SIDE)).save(images / "000002.png"), ""),
        (lambda: Image.new("RGB", (SIDE, SIDE)).save(images / "photo.png"), "1 of 5 images in .* are unknown"),
        (lambda: (images / "photo.png").unlink(), ""),
        (lambda: Image.new("RGB", (32, 64)).save(images / "000003.png"), "32x64"),
        (
            lambda: (images / "000003.png").write_bytes(b"cut"),
            "000003.png is damaged .of unknown format.; remove it and run gen again",
        ),
    ]
    for damage, message in problems:
        damage()
        assert evaluate_fid.main(["score", *arguments]) == (2 if message else 0)
        error = capsys.readouterr().err  # the last line, after what loading weights prints
        assert not message or re.search(message, error.splitlines()[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["drew"], "There is no command 'drew'; write one of ref, gen, score"),
        (["seed=1"], "The command is missing; write one of ref, gen, score"),
        (["ref", "extractor=vgg"], "Unknown feature extractor 'vgg'"),
        (["ref", "num_images=1"], "num_images must be at least 2, not 1"),
        (["ref", "data.path=nowhere"], "There is no data at nowhere"),
        (["gen", "prompts=some"], "Unknown prompts 'some'"),
        (["gen", "adapter=nowhere"], "nowhere"),
        (["gen", "controlnet=nowhere"], "ControlNet folder nowhere does not exist"),
        (["gen", "controlnet=one", "adapter=two"], "either an adapter or a controlnet"),
        (["gen", "sample=no.png"], "There is no example 'no.png'"),
        (["gen", "part=test"], "Unknown part 'test'"),
        (["gen", "num_image=3"], "did you mean num_images"),
        (["gen", "num_workers=0"], "num_workers must be at least 1, not 0"),
        (["score"], "There are no statistics"),
    ],
)
def test_mistakes_are_one_sentence(
    changes: list[str], message: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_fid.main([changes[0], *arguments, *changes[1:]]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_folders_and_adapters_of_other_settings_are_refused(
    arguments: list[str], adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_fid.main(["gen", *arguments]) == 0
    assert evaluate_fid.main(["gen", *arguments, "seed=1"]) == 2
    assert "generated with another seed;" in capsys.readouterr().err
    path = tmp_path / "fid" / "with_prompts" / "settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"versions": settings["versions"] | {"torch": "0.1"}}))
    assert evaluate_fid.main(["gen", *arguments]) == 2
    assert "generated with another versions;" in capsys.readouterr().err
    known = {"condition": ("channels_used", "palette_filter"), "mask": ("box_law",)}  # since later versions
    earlier = {name: {k: v for k, v in settings[name].items() if k not in keys} for name, keys in known.items()}
    path.write_text(json.dumps(settings | earlier))
    assert evaluate_fid.main(["gen", *arguments]) == 0
    capsys.readouterr()
    assert evaluate_fid.main(["gen", *arguments, "mask.box_law=corners"]) == 2
    assert "generated with another mask;" in capsys.readouterr().err
    path.write_text(json.dumps(settings))
    assert evaluate_fid.main(["gen", *arguments, adapter, "condition=sobel"]) == 2
    assert "was trained on" in capsys.readouterr().err
    assert evaluate_fid.main(["gen", *arguments, adapter, "base.name=micro"]) == 2
    assert "was trained on the base" in capsys.readouterr().err


def test_a_masked_controlnet_is_a_set_beside_the_others(arguments: list[str], sd_pipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(sd_pipe.unet, conditioning_channels=3)
    for name, parameter in net.named_parameters():  # also its zero convolutions, so that it has an effect
        if "controlnet_" in name and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(tmp_path / "net")
    generated = {}
    for name, extra in (
        ("base", ()),
        ("full", (f"controlnet={tmp_path / 'net'}", "mask=full")),
        ("box", (f"controlnet={tmp_path / 'net'}",)),
    ):
        assert evaluate_fid.main(["gen", *arguments, f"output_dir={tmp_path / name}", "num_images=2", *extra]) == 0
        generated[name] = contents(tmp_path / name / "with_prompts" / "images")
    assert generated["base"] != generated["box"] != generated["full"] != generated["base"]
    settings, floor = (
        json.loads((tmp_path / name / "with_prompts" / "settings.json").read_text()) for name in ("box", "base")
    )
    assert len(settings["weights_sha256"]["controlnet"]) == 64 and settings["controlnet"] == str(tmp_path / "net")
    assert "controlnet" not in floor["weights_sha256"]


def test_help_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_fid.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "num_images=2048" in printed and "evaluate_fid.py gen" in printed


def test_masks_of_the_images_are_those_of_the_adapter(
    arguments: list[str], adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    real = LocalAdapter.forward

    def forward(self: LocalAdapter, x: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(x[:, -1].clone())
        return real(self, x, *rest, **more)

    monkeypatch.setattr(LocalAdapter, "forward", forward)
    assert evaluate_fid.main(["gen", *arguments, adapter, "num_images=2"]) == 0
    stored = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "fid" / "with_prompts" / "masks").iterdir())]
    assert np.array_equal(np.stack(stored), (seen[0] * 255).round().byte().numpy())
