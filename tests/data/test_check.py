import numpy as np
import pytest
from file_data import picture, read_metadata, write_imagefolder, write_metadata
from PIL import Image, ImageDraw

from localctl.adapter import LocalAdapter
from localctl.data.__main__ import main
from localctl.data.bad_rows import way_out
from localctl.data.held_out import places_of
from localctl.images import load_image


@pytest.fixture
def folder(tmp_path):
    return write_imagefolder(tmp_path / "data", 8)


def set_masks(folder, values):
    """Each mask a rectangle of ``values`` (inside, outside) that does not touch the border."""
    inside, outside = values
    for file in (folder / "masks").iterdir():
        mask = Image.new("L", (56, 40), outside)
        ImageDraw.Draw(mask).rectangle((15, 10, 35, 25), fill=inside)
        mask.save(file)


def run(folder, tmp_path, capsys, *more):
    argv = ["check", "data=imagefolder", f"data.path={folder}", "--resolution", "32", *more]
    code = main([*argv, "--preview", str(tmp_path / "preview.png")])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_good_data_set_is_reported_without_warning(folder, tmp_path, capsys):
    set_masks(folder, (255, 0))
    code, out, err = run(
        folder, tmp_path, capsys, "condition=column", "condition.channels=1", "data.validation_share=0.3"
    )
    assert code == 0 and "checking" in err
    assert "8: " in out and "bad rows    0" in out and "8 different" in out and "tokens at most" in out
    assert "column 'conditioning_image'" in out and "column 'mask', white = controlled" in out
    warnings = [line for line in out.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "of one value" in warnings[0]  # these conditions are flat indeed
    sheet = load_image(tmp_path / "preview.png")
    assert sheet.height > 8 * 32 and sheet.width > 4 * 32
    colours = {tuple(c) for c in np.asarray(sheet).reshape(-1, 3)}
    assert (255, 0, 255) in colours  # the masks' outlines


def test_bad_rows_are_counted_with_their_reasons(folder, tmp_path, capsys):
    (folder / "images" / "001.png").write_bytes(b"<html>")
    (folder / "images" / "002.png").write_bytes(b"")
    lines = read_metadata(folder)
    del lines[3]["text"]
    write_metadata(folder, lines)
    code, out, _ = run(folder, tmp_path, capsys)
    assert code == 0
    assert "bad rows    3 (2 image of unknown format, 1 caption missing)" in out
    assert "images/003.png: caption missing" in out and "37.5% of the rows are bad" in out


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0, 255), "inverted"),
        ((0, 0), "8 masks are empty"),
        ((255, 255), "8 masks are full"),
        ((1, 0), "0 and 1 of 255"),
        ((38, 0), "8 of 8 masks: the first of them is dim, its brightest value is 0.15"),
        ((150, 0), "mostly flat gray"),
    ],
)
def test_masks_that_look_wrong(folder, tmp_path, capsys, values, words):
    set_masks(folder, values)
    _, out, _ = run(folder, tmp_path, capsys)
    warnings = [line for line in out.splitlines() if line.startswith("warning:") and "mask" in line]
    assert len(warnings) == 1 and words in warnings[0]


def test_captions_and_conditions_that_look_wrong(folder, tmp_path, capsys):
    lines = read_metadata(folder)
    for line in lines[:4]:
        line["text"] = "the same"
    lines[5]["text"] = " ".join("word" for _ in range(90))
    write_metadata(folder, lines)
    for file in (folder / "conditions").iterdir():
        picture(0).point(lambda value: value // 10).save(file)
    _, out, _ = run(folder, tmp_path, capsys, "condition=column")
    for words in (
        "4 captions are the same: 'the same'",
        "1 captions are longer than 77",
        "nearly black",
        "has colours",
    ):
        assert words in out, words


def test_masks_are_sampled_where_there_are_none(tmp_path, capsys):
    folder = write_imagefolder(tmp_path / "data", 4, masks=False)
    code, out, _ = run(folder, tmp_path, capsys, "mask=circle")
    assert code == 0 and "none in the data" in out and (tmp_path / "preview.png").exists()


def test_the_adapter_must_take_the_condition(folder, tmp_path, capsys):
    adapter = LocalAdapter(in_channels=1, channels=[8, 8], num_res_blocks=1, condition={"kind": "canny"})
    adapter.save_pretrained(tmp_path / "run" / "adapter")
    flag = ("--adapter_model_name_or_path", str(tmp_path / "run"))
    code, out, _ = run(folder, tmp_path, capsys, *flag)
    assert code == 0 and "1 input channels, trained on canny: fits" in out
    code, out, err = run(folder, tmp_path, capsys, *flag, "condition=column")
    assert code == 2 and out == "" and "takes conditions of 1 channels, but condition=column has 3" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["check"], "no check"),
        (["check", "data=imagefolder"], "needs data.path"),
        (["check", "--train_data_dir", "nowhere"], "no data at nowhere"),
        (["check", "data=imagefolder", "data.paht=x"], "data.path"),
        (["check", "--train_data_dir", ".", "--preview", "sheet.pdf"], "sheet.pdf"),
        (
            ["check", "--train_data_dir", "{folder}", "condition=depth", "--conditioning_image_column", "depth"],
            "'depth'",
        ),
    ],
)
def test_mistakes_end_with_one_sentence_and_code_2(folder, capsys, argv, words):
    assert main([part.format(folder=folder) for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and words in captured.err


def test_what_a_training_would_stop_with_and_say(tmp_path, capsys):
    folder = write_imagefolder(tmp_path / "data", 8, masks=False)
    _, out, _ = run(folder, tmp_path, capsys, "data.validation_share=0")
    assert "warning: training would stop: None of the 8 rows" in out and "--validation_steps 0." in out
    _, out, _ = run(folder, tmp_path, capsys, "data.validation_share=0", "--validation_steps", "0")
    assert "would stop" not in out and "8 to train on, 0 for validation" in out
    _, out, _ = run(folder, tmp_path, capsys, "data.validation_share=1e-9")
    assert "7 to train on, 1 for validation" in out and "one is held out for validation: images/" in out
    assert "no held-out mask contains 40 edge pixels" in out
    share = places_of(f"images/{i:03}.png" for i in range(8)).min() + 0.01
    assert "held out for validation: images/" in run(folder, tmp_path, capsys, f"data.validation_share={share}")[1]
    _, out, _ = run(folder, tmp_path, capsys, "data.validation_share=1")
    assert "training would stop: None of the 8 rows" in out and "lower it" in out


def test_the_default_size_is_named_where_the_base_has_another(tmp_path, capsys):
    folder = write_imagefolder(tmp_path / "data", 3, masks=False)
    assert main(["check", f"data.path={folder}", "--preview", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    assert "512x512 is only the default, and the base micro makes images of 128x128: --resolution 128" in out
    _, out, _ = run(folder, tmp_path, capsys, "--resolution", "64")
    assert "only the default" not in out


def test_a_validation_split_is_read_too(tmp_path, capsys):
    write_imagefolder(tmp_path / "data" / "train", 4)
    broken = write_imagefolder(tmp_path / "data" / "val", 3)
    (broken / "images" / "001.png").write_bytes(b"")
    _, out, _ = run(tmp_path / "data", tmp_path, capsys, "data.validation_split=val")
    assert (
        "4 to train on, 3 for validation" in out
        and "bad rows    1 (1 image of unknown format), in the split 'val'" in out
    )
    code, out, err = run(tmp_path / "data", tmp_path, capsys, "data.validation_split=test")
    assert code == 2 and "Nothing in" in err and "'test'" in err


def test_what_to_do_about_bad_rows_and_what_is_not_used(tmp_path, capsys):
    folder = write_imagefolder(tmp_path / "data", 8)
    lines = read_metadata(folder)
    lines[0]["text"], lines[1]["file_name"], lines[2]["text"] = None, "images/gone.png", "two\nlines \u2028 and more"
    write_metadata(folder, lines[:6])
    _, out, _ = run(folder, tmp_path, capsys)
    assert "to do: caption missing: write a caption, or set data.caption_column=null" in out
    assert "to do: image missing: add the file" in out
    assert "have no line in metadata.jsonl and are not used" in out and (tmp_path / "preview.png").exists()


def test_every_reason_has_a_way_out():
    reasons = ["metadata damaged", "row unreadable", "folder unreadable", "caption too long", "caption unreadable"]
    reasons += [
        f"image {word}" for word in ("missing", "damaged", "animated", "too large", "unreadable", "of unknown format")
    ]
    assert all(way_out(reason) for reason in reasons)
    assert (
        way_out("image too large") != way_out("image damaged") != way_out("caption missing") != way_out("mask missing")
    )


def test_usage(capsys):
    assert main(["check", "--help"]) == 0 and "data check" in capsys.readouterr().out
    assert main([]) == 2


def test_marks_of_other_tools_in_captions_are_counted(folder, tmp_path, capsys):
    lines = read_metadata(folder)
    for line in lines[:3]:
        line["text"] += ", (best quality:1.3)"
    write_metadata(folder, lines)
    _, out, _ = run(folder, tmp_path, capsys)
    assert "3 captions have syntax of other tools ((word:1.3)), which is read as text" in out
