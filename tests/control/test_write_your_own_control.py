"""The control of docs/write_your_own_control.md, read from the page."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import localctl

PAGE = Path(__file__).parents[2] / "docs" / "write_your_own_control.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 30
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_it_acts_and_at_0_it_does_not(page: dict[str, Any]) -> None:
    def latents(*controls: Any) -> torch.Tensor:
        bias = localctl.RegionBias()
        how = {"num_inference_steps": 2, "output_type": "latent"}
        return localctl.generate(page["pipe"], page["layout"], [bias, *controls], seeds=1, **how).images[0]

    own, plain = page["KeepApart"], latents()
    assert (latents(own()) - plain).abs().max() > 1e-2
    assert torch.equal(latents(own(end=0.0)), plain)
    assert len(page["images"]) == 1


def test_it_is_saved_and_loaded(page: dict[str, Any], tmp_path: Path) -> None:
    control = page["KeepApart"](amount=3.0)
    path = control.save(tmp_path / "apart.json")
    assert localctl.load_control(path, types=[page["KeepApart"]]) == control
    with pytest.raises(ValueError, match="names 'KeepApart', which is not a known control; give types="):
        localctl.load_control(path)


def test_the_page_knows_every_hook() -> None:
    text = PAGE.read_text()
    hooks = [name for name, item in vars(localctl.BoundControl).items() if callable(item) and name[0] != "_"]
    assert [name for name in hooks if f"`{name}(" not in text and name != "max_queries"] == []
    fields = [field.name for field in dataclasses.fields(localctl.CallContext)]
    assert {"step", "num_steps", "layout_of_row", "conditional"} <= set(fields)
