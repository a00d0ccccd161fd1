"""Wide residual networks: BatchNorm and ReLU before each convolution."""

from __future__ import annotations

from typing import Any, Unpack

from tscnc_tf import _checks
from tscnc_tf.applications._building import MAX_WIDTH, Builder, Options


def WideResNet(
    depth: int, width: int, *, dropout_rate: float = 0.0, **options: Unpack[Options]
) -> Any:
    """Return WRN-depth-width: three stages of 16, 32 and 64 times `width` channels.

    Convolutions are called `stem`, `stage_1_block_1_conv_1`, `stage_1_block_1_shortcut` and so on.

    Args:
        depth: the number of layers, 6n + 4 for n blocks per stage: 10, 16, 22, 28, 34, 40, ...
        width: the factor k of the channels, >= 1.
        dropout_rate: of the dropout between the two convolutions of a block, in [0, 1). `seed`
            determines which entries are dropped, in tf_keras together with TensorFlow's own seed.
        **options: see `tscnc_tf.applications`, also for the result and errors; `input_shape` of
            4x4 or more.

    Example:
        >>> WideResNet(16, 2, classes=100).name
        'wrn16x2'

    Reference:
        Zagoruyko & Komodakis 2016, arXiv 1605.07146, table 1, blocks B(3, 3).
    """
    blocks, remainder = divmod(_checks.integer("depth", depth, minimum=10) - 4, 6)
    if remainder:
        raise ValueError(
            f"depth must be 6n + 4 for n blocks per stage (10, 16, 22, 28, ...), got {depth!r}."
        )
    width = _checks.integer("width", width, minimum=1, maximum=MAX_WIDTH)
    rate = _checks.number("dropout_rate", dropout_rate, minimum=0.0, below=1.0)
    build = Builder(f"wrn{depth}x{width}", 4, **options)
    x = build.convolution(build.inputs, "stem", 16)
    for stage in (1, 2, 3):
        for block in range(1, blocks + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            place = f"stage_{stage}_block_{block}"
            x = _block(build, x, place, 8 * 2**stage * width, stride, rate)
    x = build.activated(build.normalized(x, "final_norm"), "final_activation")
    x = build.layers.GlobalAveragePooling2D(name="pool")(x)
    return build.model(x)


def WRN28x4(*, dropout_rate: float = 0.0, **options: Unpack[Options]) -> Any:
    """Return WRN-28-4, `WideResNet(28, 4)`: 5,849,050 parameters for 10 classes.

    Arguments, result, errors and reference are those of `WideResNet`.

    Example:
        >>> WRN28x4(input_shape=(32, 32, 3), classes=10).name
        'wrn28x4'
    """
    return WideResNet(28, 4, dropout_rate=dropout_rate, **options)


def WRN28x10(*, dropout_rate: float = 0.0, **options: Unpack[Options]) -> Any:
    """Return WRN-28-10, `WideResNet(28, 10)`: 36,479,194 parameters for 10 classes.

    Arguments, result, errors and reference are those of `WideResNet`.

    Example:
        >>> WRN28x10(input_shape=(32, 32, 3), classes=10).name  # doctest: +SKIP
        'wrn28x10'
    """
    return WideResNet(28, 10, dropout_rate=dropout_rate, **options)


def WRN34x10(*, dropout_rate: float = 0.0, **options: Unpack[Options]) -> Any:
    """Return WRN-34-10, `WideResNet(34, 10)`: 46,160,474 parameters for 10 classes.

    Arguments, result, errors and reference are those of `WideResNet`.

    Example:
        >>> WRN34x10(input_shape=(32, 32, 3), classes=10).name  # doctest: +SKIP
        'wrn34x10'
    """
    return WideResNet(34, 10, dropout_rate=dropout_rate, **options)


def WRN40x4(*, dropout_rate: float = 0.0, **options: Unpack[Options]) -> Any:
    """Return WRN-40-4, `WideResNet(40, 4)`: 8,949,210 parameters for 10 classes.

    Arguments, result, errors and reference are those of `WideResNet`.

    Example:
        >>> WRN40x4(input_shape=(32, 32, 3), classes=10).name
        'wrn40x4'
    """
    return WideResNet(40, 4, dropout_rate=dropout_rate, **options)


def _block(build: Builder, x: Any, place: str, width: int, stride: int, rate: float) -> Any:
    active = build.activated(build.normalized(x, f"{place}_norm_1"), f"{place}_activation_1")
    y = build.convolution(active, f"{place}_conv_1", width, stride=stride)
    y = build.activated(build.normalized(y, f"{place}_norm_2"), f"{place}_activation_2")
    if rate:
        y = build.dropout(y, f"{place}_dropout", rate)
    y = build.convolution(y, f"{place}_conv_2", width)
    if stride > 1 or x.shape[-1] != width:
        x = build.convolution(active, f"{place}_shortcut", width, size=1, stride=stride)
    return build.added(x, y, f"{place}_add")
