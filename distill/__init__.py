"""Knowledge distillation of timm models at ImageNet scale."""
