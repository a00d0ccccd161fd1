"""Networks without shortcuts: convolutions one after the other, and pooling between stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from tscnc_tf import _checks
from tscnc_tf.applications._building import MAX_WIDTH, Builder, Options

HEADS = ("hidden", "linear")


def VGG16(*, head: str = "hidden", width: int = 64, **options: Unpack[Options]) -> Any:
    """Return a VGG-16 with BatchNorm in its CIFAR form: 13 convolutions, 5 poolings, the head.

    The first convolution is called `stem`; the others keep their numbers in the paper:
    `stage_1_conv_2`, `stage_2_conv_1` and so on to `stage_5_conv_3`, then `hidden_1`, `hidden_2`.

    For 10 classes it has 15,249,354 trainable parameters, or 14,724,042 with the linear head. The
    14,728,266 of the literature include 4,224 biases of the convolutions.

    Args:
        head: "hidden", two dense layers of 512 before the logits; or "linear", the logits alone.
        width: the number of channels of the first stage; all other widths are multiples of it.
        **options: see `tscnc_tf.applications`, also for the result and errors; `input_shape` of
            32x32 or more.

    Example:
        >>> VGG16(head="linear").output_shape
        (None, 10)

    Reference:
        Simonyan & Zisserman 2015, arXiv 1409.1556, table 1, column D.
    """
    _checks.one_of("head", head, HEADS)
    width = _checks.integer("width", width, minimum=1, maximum=MAX_WIDTH)
    build = Builder("vgg16", 32, **options)
    depths = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
    x = _stages(build, [(factor * width, depth) for factor, depth in depths])
    x = build.layers.Flatten(name="flatten")(x)
    if head == "hidden":
        x = build.hidden(build.hidden(x, "hidden_1", 8 * width), "hidden_2", 8 * width)
    return build.model(x)


def VGG8(*, width: int = 32, **options: Unpack[Options]) -> Any:
    """Return a small VGG with BatchNorm: three stages of two convolutions, and two dense layers.

    For 10 classes it has 814,570 trainable parameters, or 584,618 for images of 28x28 pixels and
    one channel. Convolutions are called `stem`, `stage_1_conv_2`, `stage_2_conv_1` and so on to
    `stage_3_conv_2`, then `hidden_1`. The kernels between the first and the last have from 9,216
    weights (`stage_1_conv_2`) to 524,288 (`hidden_1`).

    Args:
        width: the number of channels of the first stage; the later ones have twice and four times
            as many, the dense layer eight times.
        **options: see `tscnc_tf.applications`, also for the result and errors; `input_shape` of
            8x8 or more.

    Example:
        >>> VGG8(input_shape=(28, 28, 1), mean=(0.286,), std=(0.353,)).output_shape
        (None, 10)

    Reference:
        Simonyan & Zisserman 2015, arXiv 1409.1556; the first three stages, each with two
        convolutions.
    """
    width = _checks.integer("width", width, minimum=1, maximum=MAX_WIDTH)
    build = Builder("vgg8", 8, **options)
    x = _stages(build, [(factor * width, 2) for factor in (1, 2, 4)])
    x = build.hidden(build.layers.Flatten(name="flatten")(x), "hidden_1", 8 * width)
    return build.model(x)


def LeNet5(
    *, width: int = 32, hidden: int = 1024, kernel_size: int = 5, **options: Unpack[Options]
) -> Any:
    """Return the LeNet-5 of the literature on robustness: two convolutions and two dense layers.

    For 10 classes it has 4,259,274 trainable parameters, or 3,274,634 for images of 28x28 pixels
    and one channel, 98 % of them in the dense layer `hidden_1`. The convolutions, `stem` and
    `stage_2_conv_1`, have biases and no BatchNorm; each is followed by the activation and pooling.

    Args:
        width: the number of channels of the first convolution; the second has twice as many.
        hidden: the number of units of the dense layer.
        kernel_size: height and width of the convolutions' kernels.
        **options: see `tscnc_tf.applications`, also for the result and errors; `input_shape` of
            4x4 or more.

    Example:
        >>> LeNet5(input_shape=(28, 28, 1)).count_params()
        3274634

    Reference:
        LeCun et al. 1998; widths of Madry et al. 2018, arXiv 1706.06083, section 5 (MNIST).
    """
    width = _checks.integer("width", width, minimum=1, maximum=MAX_WIDTH)
    hidden = _checks.integer("hidden", hidden, minimum=1)
    size = _checks.integer("kernel_size", kernel_size, minimum=1)
    build = Builder("lenet5", 4, **options)
    x = build.convolution(build.inputs, "stem", width, size=size, use_bias=True)
    x = build.layers.MaxPooling2D(name="stage_1_pool")(build.activated(x, "stem_activation"))
    x = build.convolution(x, "stage_2_conv_1", 2 * width, size=size, use_bias=True)
    x = build.activated(x, "stage_2_activation_1")
    x = build.layers.MaxPooling2D(name="stage_2_pool")(x)
    return build.model(build.hidden(build.layers.Flatten(name="flatten")(x), "hidden_1", hidden))


def SmallCNN(*, width: int = 16, **options: Unpack[Options]) -> Any:
    """Return a network that a CPU trains in minutes: two stages of two convolutions, and logits.

    For 10 classes it has 17,082 trainable parameters. Convolutions are called `stem`,
    `stage_1_conv_2`, `stage_2_conv_1` and `stage_2_conv_2`.

    Args:
        width: the number of channels of the first stage; the second has twice as many.
        **options: see `tscnc_tf.applications`, also for the result and errors; `input_shape` of
            4x4 or more.

    Example:
        >>> SmallCNN(input_shape=(8, 8, 1), mean=(0.3,), std=(0.38,), seed=0).output_shape
        (None, 10)
    """
    width = _checks.integer("width", width, minimum=1, maximum=MAX_WIDTH)
    build = Builder("small_cnn", 4, **options)
    x = _stages(build, ((width, 2), (2 * width, 2)))
    return build.model(build.layers.GlobalAveragePooling2D(name="pool")(x))


def _stages(build: Builder, stages: Sequence[tuple[int, int]]) -> Any:
    """Return the output of stages, each given as (channels, convolutions)."""
    x = build.stem(stages[0][0])
    for stage, (width, depth) in enumerate(stages, start=1):
        place = f"stage_{stage}"
        for number in range(2 if stage == 1 else 1, depth + 1):
            x = build.convolution(x, f"{place}_conv_{number}", width)
            x = build.normalized(x, f"{place}_norm_{number}")
            x = build.activated(x, f"{place}_activation_{number}")
        x = build.layers.MaxPooling2D(name=f"{place}_pool")(x)
    return x
