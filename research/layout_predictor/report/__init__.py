"""How good a layout predictor is: `python -m research.layout_predictor.report`."""
