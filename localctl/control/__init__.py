"""Controls: everything that steers the frozen U-Net while sampling, one method per file."""
