"""The pages of the families of transformers: their examples run, on tiny pipelines loaded from a folder."""

import re
import shlex
from pathlib import Path

import torch
from families import token_adapter
from PIL import Image
from sample_helpers import CANNY

from localctl.cli import sample
from localctl.cli.training_flags import training_settings
from localctl.training.settings import TrainSettings

PAGES = Path(__file__).parents[1] / "docs"
SIDE = 64

pytest_plugins = ["families"]


def examples(page):
    """The Python of a page, in small."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    assert code, page
    code = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", code)
    code = re.sub(r"torch\.b?float16", "torch.float32", code.replace('"cuda"', '"cpu"'))
    return code.replace("seeds=", f"height={SIDE}, width={SIDE}, seeds=")


def test_the_examples_of_a_page_run(family, family_folders, tmp_path, monkeypatch):
    code, loaded = re.subn(
        r'load_pipeline\("[^"]+"',
        f'load_pipeline("{family_folders(family.name)}"',
        examples(PAGES / "families" / f"{family.name}.md"),
    )
    assert loaded == 1
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, family.name, "exec"), {})
    assert Image.open("fox.png").size == (SIDE, SIDE)
    assert {path.name for path in tmp_path.iterdir()} == set(re.findall(r'save\("([^"]+)"\)', code))


def test_the_commands_of_a_page_run(family, dit, family_folders, tmp_path, monkeypatch):
    """In small: images are generated, and the settings of a training are read."""
    text = (PAGES / "families" / f"{family.name}.md").read_text().replace("\\\n", "")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("python ")]
    assert [command[1] for command in commands] == ["sample.py", "train_adapter.py", "train_adapter.py", "sample.py"]
    monkeypatch.chdir(tmp_path)
    for name in ("photo", "mask"):
        Image.new("L", (SIDE, SIDE), 255).save(f"{name}.png")
    adapter = token_adapter(dit)
    adapter.register_to_config(base=str(family_folders(family.name)), condition=CANNY)
    adapter.save_pretrained(f"outputs/{family.name}_adapter")
    for program, *words in (command[1:] for command in commands):
        if program == "train_adapter.py":
            settings = training_settings(program, words, TrainSettings, None)
            assert settings.base.name == family.name and settings.gradient_checkpointing
            continue
        given = dict(zip(words[::2], words[1::2], strict=True))
        given |= {"--base": str(family_folders(family.name)), "--dtype": "float32", "--resolution": str(SIDE)}
        given |= {"--num_inference_steps": "2"}
        assert sample.main([word for pair in given.items() for word in pair]) == 0
        assert list(Path(given["--output_dir"]).glob("00_seed*.png"))


def test_the_adapter_of_the_overview_fits(family, dit):
    names = {"pipe": dit}
    exec(compile("import localctl\n" + examples(PAGES / "families.md"), "families.md", "exec"), names)
    adapter, denoiser = names["adapter"], names["denoiser_of"](dit)
    side = adapter.size_multiple
    features = adapter(torch.zeros(1, 2, 2 * side, 2 * side))
    assert [feature.shape[1] for feature in features] == [denoiser.width] * 8
