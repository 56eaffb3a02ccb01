"""The papers' CIFAR architectures, in timm's own registry under the prefix `cifar_`; `_224` variants are for 224 px images."""

from distill.models.cifar import mobilenetv2 as mobilenetv2
from distill.models.cifar import resnet as resnet
from distill.models.cifar import shufflenet as shufflenet
from distill.models.cifar import vgg as vgg
from distill.models.cifar import wrn as wrn
