"""MobileNets: depthwise and 1x1 convolutions, in the form that LiteRT runs sparsely."""

from __future__ import annotations

from typing import Any, Unpack

from tscnc_tf import _checks
from tscnc_tf.applications._building import MAX_WIDTH, Builder, Options

# Channels, the number of blocks, and the stride of the first of them.
_V1 = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
# Factor of expansion, channels, number of blocks, stride of the first of them.
_V2 = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


def MobileNetV1(*, width: float = 1.0, strides: int = 3, **options: Unpack[Options]) -> Any:
    """Return a MobileNet: 13 blocks of a depthwise and a 1x1 convolution each.

    For 10 classes it has 3,217,226 trainable parameters, 98 % of them in 1x1 convolutions. These
    are called `stage_1_block_1_pointwise` and so on, the depthwise ones
    `stage_1_block_1_depthwise`; `layers="*_pointwise"` selects only the former for pruning. LiteRT
    runs the pruned network sparsely on many processors, see `export.sparse_inference`, since
    strided convolutions are padded by 1 on each side, as in PyTorch.

    Args:
        width: a factor for the numbers of channels, which are rounded to multiples of 8.
        strides: the number of layers of stride 2, the first convolution included: 3 for CIFAR, with
            4x4 features at the end; or 5 as in the paper, for images of 96x96 or more. The stages
            after these have stride 1.
        **options: see `tscnc_tf.applications`, also for the result and errors; `input_shape` of
            2 ** strides or more. The paper's activation is "relu", as here.

    Example:
        >>> MobileNetV1(width=0.25).output_shape
        (None, 10)
        >>> model = MobileNetV1(width=0.25, input_shape=(96, 96, 3), strides=5)
        >>> model.get_layer("pool").input.shape
        (None, 3, 3, 256)

    Reference:
        Howard et al. 2017, arXiv 1704.04861, table 1.
    """
    build, width, strides = _start("mobilenetv1", width, strides, options)
    x = _stem(build, _channels(32, width))
    for stage, (channels, blocks, stride) in enumerate(_V1, start=1):
        for block in range(1, blocks + 1):
            place = f"stage_{stage}_block_{block}"
            now = stride if block == 1 and strides >= stage else 1
            x = _depthwise(build, x, place, now)
            x = build.convolution(x, f"{place}_pointwise", _channels(channels, width), size=1)
            x = build.activated(build.normalized(x, f"{place}_norm"), f"{place}_activation")
    return build.model(build.layers.GlobalAveragePooling2D(name="pool")(x))


def MobileNetV2(*, width: float = 1.0, strides: int = 3, **options: Unpack[Options]) -> Any:
    """Return a MobileNetV2: 17 inverted residual blocks, and a 1x1 convolution after them.

    For 10 classes it has 2,236,682 trainable parameters. The 1x1 convolutions of a block are called
    `stage_2_block_1_expand` and `stage_2_block_1_project`, its depthwise one
    `stage_2_block_1_depthwise`, the last 1x1 convolution `stage_8_expand`. LiteRT runs it sparsely
    as it does `MobileNetV1`.

    Args:
        width: a factor for the numbers of channels, which are rounded to multiples of 8; those of
            the last convolution only if it is above 1.
        strides: the number of layers of stride 2, as for `MobileNetV1`.
        **options: see `tscnc_tf.applications`, also for the result and errors; `input_shape` of
            2 ** strides or more. The paper's activation, with a bound of 6, is
            `activation=keras.activations.relu6`.

    Example:
        >>> MobileNetV2(width=0.35).output_shape
        (None, 10)

    Reference:
        Sandler et al. 2018, arXiv 1801.04381, table 2.
    """
    build, width, strides = _start("mobilenetv2", width, strides, options)
    x = _stem(build, _channels(32, width))
    done = 1
    for stage, (factor, channels, blocks, stride) in enumerate(_V2, start=1):
        for block in range(1, blocks + 1):
            now = stride if block == 1 and done < strides else 1
            done += now > 1
            place = f"stage_{stage}_block_{block}"
            x = _inverted_residual(build, x, place, factor, _channels(channels, width), now)
    x = build.convolution(x, "stage_8_expand", _channels(1280, max(width, 1.0)), size=1)
    x = build.activated(build.normalized(x, "stage_8_norm"), "stage_8_activation")
    return build.model(build.layers.GlobalAveragePooling2D(name="pool")(x))


def _start(kind: str, width: Any, strides: Any, options: Options) -> tuple[Builder, float, int]:
    """Return the builder, and the checked arguments."""
    width = _checks.number("width", width, above=0.0, maximum=float(MAX_WIDTH))
    strides = _checks.integer("strides", strides, minimum=1, maximum=5)
    return Builder(kind, 2**strides, **options), width, strides


def _channels(count: int, width: float) -> int:
    """Return a number of channels, rounded as the papers' code does: down by a tenth at most."""
    wanted = count * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def _stem(build: Builder, channels: int) -> Any:
    x = build.padded(build.inputs, "stem_pad")
    x = build.convolution(x, "stem", channels, stride=2, padding="valid")
    return build.activated(build.normalized(x, "stem_norm"), "stem_activation")


def _depthwise(build: Builder, x: Any, place: str, stride: int) -> Any:
    """Return x after a depthwise convolution, normalised and activated."""
    padding = "same"
    if stride > 1:
        x, padding = build.padded(x, f"{place}_pad"), "valid"
    x = build.depthwise(x, f"{place}_depthwise", stride=stride, padding=padding)
    x = build.normalized(x, f"{place}_depthwise_norm")
    return build.activated(x, f"{place}_depthwise_activation")


def _inverted_residual(
    build: Builder, x: Any, place: str, factor: int, channels: int, stride: int
) -> Any:
    before = x
    if factor > 1:
        x = build.convolution(x, f"{place}_expand", factor * x.shape[-1], size=1)
        x = build.activated(build.normalized(x, f"{place}_expand_norm"), f"{place}_activation")
    x = _depthwise(build, x, place, stride)
    x = build.normalized(
        build.convolution(x, f"{place}_project", channels, size=1), f"{place}_norm"
    )
    is_residual = stride == 1 and before.shape[-1] == channels
    return build.added(before, x, f"{place}_add") if is_residual else x
