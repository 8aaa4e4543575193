"""What things cost: time and memory, as ratios within one run."""
