"""How much of the possible control an adapter reaches inside the mask, and whether it leaks out of it."""
