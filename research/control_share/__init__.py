"""The share of the possible control that an adapter reaches inside the mask, and its leak out of the mask."""
