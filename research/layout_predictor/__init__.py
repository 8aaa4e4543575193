"""Training of the layout predictor, and its measurement."""
