"""The networks of the literature on robust pruning, in their forms for CIFAR, and smaller ones.

Each function returns a built functional model with new weights, from images in [0, 1],
`(batch, *input_shape)`, to logits `(batch, classes)`. It raises a TypeError if an argument is of a
wrong type, and a ValueError if one is out of its range, or if `mean` and `std` don't fit the
channels. All functions have these keyword arguments:

* `input_shape=(32, 32, 3)`: height, width and channels; the sizes need not be equal.
* `classes=10`: the number of logits.
* `mean=None`, `std=None`: statistics per channel. With them the network begins with a layer
  `normalization` that computes (x - mean) / std, so that attacks act on pixels in [0, 1]. It has
  no weights, and is saved, cloned and exported with the model.
* `activation="relu"`: any name or function that Keras takes.
* `kernel_initializer="he_normal"`: of all kernels.
* `library="keras"`: "keras" (Keras 3) or "tf_keras".
* `seed=None`: the seed of the initial weights. The same integer gives the same weights, whatever
  has been drawn before; None leaves them to Keras' own generator.
* `name=None`: the model's name; None is its kind, such as "resnet18" or "wrn28x4".

They differ from the first papers as the later literature does: 3x3 stems of stride 1 with no
pooling after them, BatchNorm before each activation (except in hidden dense layers), no biases
before BatchNorm, which would cancel them, and projections as shortcuts where the shape changes.
(LeNet5 is as in its papers: kernels of 5x5, pooling after each convolution, biases, no BatchNorm.)
BatchNorm has momentum 0.9. Strided convolutions pad as `padding="same"` does, at the end only;
PyTorch pads at both ends, and so do the MobileNets here.

In all of them the first convolution is called `stem`, the classifier `logits`, and all other
convolutions `stage_...`, so that `layers="stage_*"` selects only the latter.

Under a mixed precision policy the normalisation and the logits are computed in float32.
"""

from tscnc_tf.applications.mobilenet import MobileNetV1, MobileNetV2
from tscnc_tf.applications.plain import VGG8, VGG16, LeNet5, SmallCNN
from tscnc_tf.applications.resnet import ResNet18, ResNet20
from tscnc_tf.applications.wide_resnet import WideResNet, WRN28x4, WRN28x10, WRN34x10, WRN40x4

__all__ = [
    "LeNet5",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet18",
    "ResNet20",
    "SmallCNN",
    "VGG16",
    "VGG8",
    "WRN28x10",
    "WRN28x4",
    "WRN34x10",
    "WRN40x4",
    "WideResNet",
]
