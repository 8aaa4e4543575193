"""Training a local adapter on a frozen base."""
