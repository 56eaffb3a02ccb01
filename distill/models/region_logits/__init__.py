"""Logits of image regions through a model's own head: what a model is, and which way to them holds for it."""
