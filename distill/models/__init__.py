"""The model room: any timm model as a `Backbone`; importing it registers the papers' CIFAR nets and SimKD's student."""

from distill.models import cifar as cifar
from distill.models import simkd as simkd
