"""How good a layout predictor is: `python -m localctl.layout_predictor.report`."""
