"""Shard preparation."""
