"""Measurements that need a base, adapters and data together."""
