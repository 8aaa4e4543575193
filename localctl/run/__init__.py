"""What every trainer shares: configuration, checkpoints, logging."""
