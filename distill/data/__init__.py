"""Images for training and evaluation: shard index, visiting order, augmentation parameters, and two loaders that agree."""
