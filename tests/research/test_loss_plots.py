"""The plots of the loss show what the loss computes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tolerances import rounding

from localctl.data import Example
from localctl.diffusion import add_noise
from localctl.losses import LossConfig
from localctl.seeding import noise
from research.loss_plots import (
    Prediction,
    compared_plot,
    feature_sheet,
    local_plot,
    loss_sheet,
    map_to_pil,
    predict,
    predicted_sheet,
    schedule_plot,
)

TIMESTEPS = [10, 400, 990]
UNET = 40 * 9 * 32  # layers in a row of the tiny base, the longest sums of each


@pytest.fixture
def example() -> Example:
    pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    return Example("one", pixels, torch.rand(1, 64, 64), "a cat", mask=mask)


def of_truth(example: Example, alphas: torch.Tensor) -> Prediction:
    """Return a prediction as if the U-Net knew the noise."""
    latents = noise((4, 8, 8), 1, "latents").expand(3, -1, -1, -1)
    sample = add_noise(latents, noise(latents.shape, 2, "noise"), torch.tensor(TIMESTEPS), alphas)
    return Prediction(example, sample, sample.noise, alphas, "epsilon")


def test_prediction_is_the_unets_for_one_image_at_every_timestep(sd_pipe: Any, example: Example) -> None:
    together = predict(sd_pipe, example, TIMESTEPS)
    alone = predict(sd_pipe, example, TIMESTEPS[1:2])
    assert torch.equal(together.sample.noise[0], together.sample.noise[2])
    near = float(alone.output.abs().max()) * rounding(UNET)  # of a batch of three and of one, in other orders
    torch.testing.assert_close(together.output[1], alone.output[0], rtol=0, atol=near)
    with torch.no_grad():
        text = sd_pipe.encode_prompt("a cat", "cpu", 1, False)[0]
        wanted = sd_pipe.unet(alone.sample.noisy, TIMESTEPS[1], text).sample
    torch.testing.assert_close(alone.output, wanted)


def test_an_adapter_speaks_through_its_mask(sd_pipe: Any, make_adapter: Any, example: Example) -> None:
    adapter = make_adapter()
    plain, steered = predict(sd_pipe, example, TIMESTEPS), predict(sd_pipe, example, TIMESTEPS, adapter)
    assert example.mask is not None
    nowhere = predict(sd_pipe, replace(example, mask=0 * example.mask), TIMESTEPS, adapter)
    assert torch.equal(nowhere.output, plain.output) and not torch.equal(steered.output, plain.output)


def test_sdxl_gets_its_sizes(sdxl_pipe: Any, example: Example) -> None:
    assert predict(sdxl_pipe, example, TIMESTEPS).predicted_x0.shape == (3, 4, 8, 8)


def test_a_perfect_prediction_has_no_local_term(sd_pipe: Any, example: Example) -> None:
    alphas = sd_pipe.scheduler.alphas_cumprod
    truth = of_truth(example, alphas)
    torch.testing.assert_close(truth.predicted_x0, truth.sample.latents, rtol=0, atol=2e-4)
    assert float(truth.terms(LossConfig()).local.max()) < 1e-6
    shown = loss_sheet(sd_pipe, truth, LossConfig(), side=32)
    # columns of the two filtered maps, at the first timestep
    cells = [shown.crop((4 + 36 * k, 32, 36 + 36 * k, 64)) for k in (2, 3)]
    assert cells[0].tobytes() == cells[1].tobytes() and len(np.unique(np.asarray(cells[0]))) > 5


def test_the_mask_blanks_features_and_leaves_the_rest_as_it_was(make_adapter: Any, example: Example) -> None:
    side, pad = 64, 4
    sheet = np.asarray(feature_sheet(make_adapter(), example, side))

    def cell(row: int, column: int) -> np.ndarray:
        left, top = pad + column * (side + pad), pad + 14 + 14 + row * (side + pad + 14)
        return sheet[top : top + side, left : left + side]

    whole, masked = cell(0, 1), cell(1, 1)  # of the first level; the mask is the left half
    assert np.array_equal(whole[:, : side // 2], masked[:, : side // 2]) and len(np.unique(masked)) > 5
    assert len(np.unique(masked[:, side // 2 :].reshape(-1, 3), axis=0)) == 1
    assert not np.array_equal(whole, masked)


def test_what_is_predicted_in_a_row_each(sd_pipe: Any, example: Example) -> None:
    prediction = of_truth(example, sd_pipe.scheduler.alphas_cumprod)
    one = predicted_sheet(sd_pipe, {"truth": prediction}, side=32)
    two = predicted_sheet(sd_pipe, {"truth": prediction, "again": prediction}, side=32)
    assert one.width == two.width == 4 + 4 * 36 and two.height > one.height
    cells = [np.asarray(one.crop((4 + 36 * k, 32, 36 + 36 * k, 64))).astype(int) for k in (1, 2)]
    assert np.abs(cells[0] - cells[1]).max() <= 2  # a perfect prediction is the same at every t


def test_maps_and_plots(sd_pipe: Any, example: Example) -> None:
    values = np.asarray(map_to_pil(torch.tensor([[0.0, 1.0], [2.0, 4.0]]), 4, top=2.0)).astype(int)
    brightness = values.sum(-1)
    assert brightness[0, 0] < brightness[0, 3] < brightness[3, 0] == brightness[3, 3]
    alphas = sd_pipe.scheduler.alphas_cumprod
    plots = [
        schedule_plot(alphas, [0, 500, 999], names, LossConfig()) for names in (("constant",), ("constant", "snr"))
    ]
    prediction = predict(sd_pipe, example, TIMESTEPS)
    plots.append(local_plot([prediction, of_truth(example, alphas)], {"sobel": LossConfig()}))
    plots.append(compared_plot({"base": [prediction], "truth": [of_truth(example, alphas)]}, LossConfig()))
    assert all(isinstance(plot, Image.Image) for plot in plots) and plots[0].tobytes() != plots[1].tobytes()


def test_mistakes_raise_value_errors(sd_pipe: Any, make_adapter: Any, example: Example) -> None:
    with pytest.raises(ValueError, match="from 0 to 999"):
        predict(sd_pipe, example, [1000])
    with pytest.raises(ValueError, match="has no mask"):
        predict(sd_pipe, replace(example, mask=None), [1])
    with pytest.raises(ValueError, match="has no mask"):
        feature_sheet(make_adapter(), replace(example, mask=None))
    prediction = predict(sd_pipe, example, [1])
    with pytest.raises(ValueError, match="no filter"):
        loss_sheet(sd_pipe, prediction, LossConfig(filter="none"))
