"""Networks without shortcuts: convolutions one after the other, and pooling between stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from tscnc_tf import _checks
from tscnc_tf.applications._building import Builder, Options

HEADS = ("hidden", "linear")


def VGG16(*, head: str = "hidden", width: int = 64, **options: Unpack[Options]) -> Any:
    """Return a VGG-16 with BatchNorm in its CIFAR form: 13 convolutions, 5 poolings, the head.

    The first convolution is called `stem`; the others keep their numbers in the paper:
    `stage_1_conv_2`, `stage_2_conv_1` and so on to `stage_5_conv_3`, then `hidden_1`, `hidden_2`.

    For 10 classes it has 15,249,354 trainable parameters, with the linear head 14,724,042. Where
    the literature has 14,728,266, the convolutions have biases besides, 4,224 of them.

    Args:
        head: "hidden", two dense layers of 512 before the logits; or "linear", the logits alone.
        width: the number of channels of the first stage; all other widths go with it.
        **options: see `tscnc_tf.applications`; `input_shape` of 32x32 or more.

    Returns:
        A functional model from `(batch, *input_shape)` to logits `(batch, classes)`.

    Raises:
        TypeError: an argument is not of the kind said there.
        ValueError: an argument is out of its range, or mean and std don't fit the channels.

    Example:
        >>> VGG16(head="linear").output_shape
        (None, 10)

    Reference:
        Simonyan & Zisserman 2015, arXiv 1409.1556, table 1, column D.
    """
    _checks.one_of("head", head, HEADS)
    width = _checks.integer("width", width, minimum=1)
    build = Builder("vgg16", 32, **options)
    depths = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
    x = _stages(build, [(factor * width, depth) for factor, depth in depths])
    x = build.layers.Flatten(name="flatten")(x)
    if head == "hidden":
        x = build.hidden(build.hidden(x, "hidden_1", 8 * width), "hidden_2", 8 * width)
    return build.model(x)


def SmallCNN(*, width: int = 16, **options: Unpack[Options]) -> Any:
    """Return a network that a CPU trains in minutes: two stages of two convolutions, and logits.

    For 10 classes it has 17,082 trainable parameters. Convolutions are called `stem`,
    `stage_1_conv_2`, `stage_2_conv_1` and `stage_2_conv_2`.

    Args:
        width: the number of channels of the first stage; the second has twice as many.
        **options: see `tscnc_tf.applications`; `input_shape` of 4x4 or more.

    Returns:
        A functional model from `(batch, *input_shape)` to logits `(batch, classes)`.

    Raises:
        TypeError: an argument is not of the kind said there.
        ValueError: an argument is out of its range, or mean and std don't fit the channels.

    Example:
        >>> SmallCNN(input_shape=(8, 8, 1), mean=(0.3,), std=(0.38,), seed=0).output_shape
        (None, 10)
    """
    width = _checks.integer("width", width, minimum=1)
    build = Builder("small_cnn", 4, **options)
    x = _stages(build, ((width, 2), (2 * width, 2)))
    return build.model(build.layers.GlobalAveragePooling2D(name="pool")(x))


def _stages(build: Builder, stages: Sequence[tuple[int, int]]) -> Any:
    """Return what stages of (channels, convolutions) make of the input."""
    x = build.stem(stages[0][0])
    for stage, (width, depth) in enumerate(stages, start=1):
        place = f"stage_{stage}"
        for number in range(2 if stage == 1 else 1, depth + 1):
            x = build.convolution(x, f"{place}_conv_{number}", width)
            x = build.normalized(x, f"{place}_norm_{number}")
            x = build.activated(x, f"{place}_activation_{number}")
        x = build.layers.MaxPooling2D(name=f"{place}_pool")(x)
    return x
