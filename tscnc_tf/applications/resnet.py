"""Residual networks with BatchNorm and ReLU after each convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from tscnc_tf import _checks
from tscnc_tf.applications._building import MAX_WIDTH, Builder, Options


def ResNet18(*, width: int = 64, **options: Unpack[Options]) -> Any:
    """Return a ResNet-18 in its CIFAR form: stages of 64, 128, 256 and 512 channels, 2 blocks each.

    For 10 classes it has 11,173,962 trainable parameters. Convolutions are called `stem`,
    `stage_2_block_1_conv_1`, `stage_2_block_1_shortcut` and so on.

    Args:
        width: the number of channels of the first stage; each later one has twice as many.
        **options: see `tscnc_tf.applications`, also for the result and errors; `input_shape` of
            8x8 or more.

    Example:
        >>> model = ResNet18(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
        >>> model.output_shape
        (None, 10)

    Reference:
        He et al. 2016, arXiv 1512.03385, table 1, with the stem of section 4.2.
    """
    width = _checks.integer("width", width, minimum=1, maximum=MAX_WIDTH)
    build = Builder("resnet18", 8, **options)
    widths = (width, 2 * width, 4 * width, 8 * width)
    return _residual(build, stem=width, widths=widths, blocks=2)


def ResNet20(**options: Unpack[Options]) -> Any:
    """Return the ResNet-20 made for CIFAR: stages of 16, 32 and 64 channels, 3 blocks each.

    For 10 classes it has 272,474 trainable parameters. The paper's network has 2,752 fewer, as its
    shortcuts pad with zeros, where these are projections. Layers are called as in `ResNet18`.

    Args:
        **options: see `tscnc_tf.applications`, also for the result and errors; `input_shape` of
            4x4 or more.

    Example:
        >>> ResNet20(classes=100).output_shape
        (None, 100)

    Reference:
        He et al. 2016, arXiv 1512.03385, section 4.2, with option B of section 3.3 for shortcuts.
    """
    build = Builder("resnet20", 4, **options)
    return _residual(build, stem=16, widths=(16, 32, 64), blocks=3)


def _residual(build: Builder, *, stem: int, widths: Sequence[int], blocks: int) -> Any:
    x = build.stem(stem)
    for stage, width in enumerate(widths, start=1):
        for block in range(1, blocks + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            x = _block(build, x, f"stage_{stage}_block_{block}", width, stride)
    return build.model(build.layers.GlobalAveragePooling2D(name="pool")(x))


def _block(build: Builder, x: Any, place: str, width: int, stride: int) -> Any:
    y = build.convolution(x, f"{place}_conv_1", width, stride=stride)
    y = build.activated(build.normalized(y, f"{place}_norm_1"), f"{place}_activation_1")
    y = build.normalized(build.convolution(y, f"{place}_conv_2", width), f"{place}_norm_2")
    if stride > 1 or x.shape[-1] != width:
        x = build.convolution(x, f"{place}_shortcut", width, size=1, stride=stride)
        x = build.normalized(x, f"{place}_shortcut_norm")
    return build.activated(build.added(x, y, f"{place}_add"), f"{place}_activation_2")
