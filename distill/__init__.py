"""Knowledge distillation of timm models at ImageNet scale."""

__version__ = "0.2.0.dev0"
