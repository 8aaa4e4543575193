"""Controls: everything that steers or reads the frozen denoiser while sampling, one method per file."""
