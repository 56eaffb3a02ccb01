"""Shards that live elsewhere: stores by the scheme of their URL, and the cache of a node that has their objects as files."""
