"""A run that generates images, from its settings to its files: the same for the command line and the studio."""
