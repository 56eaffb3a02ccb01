"""The model room: any timm model as a `Backbone`; importing it registers the papers' CIFAR architectures with timm."""

from distill.models import cifar as cifar
