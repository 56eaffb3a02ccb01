"""Augmentation: what is drawn for each image, and how DALI and Pillow carry it out."""
