"""The forms of the convolution against a loop and each other, and under transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topk_jax import layers
from topk_jax.convolution import conv2d, conv_general_dilated

TOLERANCE = 1e-5
"""Relative to the largest output."""


def draw(shape, size, out, dtype=np.float32):
    rng = np.random.default_rng(sum(shape) + size)
    x = rng.normal(size=shape)
    kernel = rng.normal(size=(size, size, shape[-1], out)) * (size * size * shape[-1]) ** -0.5
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def loop_conv2d(x, kernel, stride, padding):
    """Window by window, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    size = kernel.shape[0]
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    out = np.empty((len(x), rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            window = x[:, top : top + size, left : left + size]
            out[:, i, j] = np.tensordot(window, kernel, axes=3)
    return out


def assert_close(found, expected, tolerance=TOLERANCE):
    expected = np.asarray(expected, np.float64)
    difference = np.abs(np.asarray(found, np.float64) - expected)
    assert difference.max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("method", "n"), [("auto", 1), ("xla", 2), ("winograd", 1), ("winograd", 2)]
)
@pytest.mark.parametrize("sides", [(1, 1), (2, 5), (4, 4), (7, 7), (8, 3), (13, 14), (17, 1)])
def test_3x3(sides, n, method):
    x, kernel = draw((n, *sides, 5), 3, 6)
    found = jax.jit(functools.partial(conv2d, padding=1, method=method))(x, kernel)
    assert_close(found, loop_conv2d(x, kernel, 1, 1))


@pytest.mark.parametrize("method", ["auto", "xla", "dot"])
@pytest.mark.parametrize("sides", [(1, 1), (5, 3)])
def test_1x1(sides, method):
    x, kernel = draw((2, *sides, 5), 1, 6)
    assert_close(conv2d(x, kernel, method=method), loop_conv2d(x, kernel, 1, 0))


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [(11, 4, 2), (7, 2, 3), (5, 1, 2), (3, 2, 1), (3, 1, 0), (1, 2, 0)],
)
def test_other_kernels(size, stride, padding):
    x, kernel = draw((2, 19, 17, 3), size, 4)
    found = conv2d(x, kernel, stride=stride, padding=padding)
    assert_close(found, loop_conv2d(x, kernel, stride, padding))


@pytest.mark.parametrize("channels", [256, 512])
def test_wide_3x3_of_either_kind_of_columns(channels):
    x, kernel = draw((1, 5, 3, channels), 3, channels)
    found = jax.jit(functools.partial(conv2d, padding=1))(x, kernel)
    assert_close(found, loop_conv2d(x, kernel, 1, 1))


def test_wide_float32_layers_use_winograd_on_a_cpu():
    """What is chosen shows in the program: a convolution, six 1-D ones, or products and none."""

    def convolutions(channels, n=2, dtype=np.float32):
        x, kernel = draw((n, 4, 4, channels), 3, channels, dtype)
        program = str(jax.make_jaxpr(lambda x, kernel: conv2d(x, kernel, padding=1))(x, kernel))
        return program.count("conv_general_dilated[")

    assert convolutions(128) == 1
    assert convolutions(128, n=1) == 6
    assert convolutions(64, n=1) == 1
    assert convolutions(256) == 6
    assert convolutions(512) == 0
    assert convolutions(256, dtype=jnp.bfloat16) == 1


def test_winograd_is_accurate_with_many_channels():
    x, kernel = draw((1, 8, 8, 512), 3, 256)
    found = conv2d(x, kernel, padding=1, method="winograd")
    assert_close(found, loop_conv2d(x, kernel, 1, 1), 5e-6)


@pytest.mark.parametrize(("size", "method"), [(1, "dot"), (3, "winograd")])
def test_derivatives(size, method):
    """Both gradients, a tangent and a second derivative equal those of XLA's convolution."""
    x, kernel = draw((2, 7, 6, 4), size, 5)
    dx, dkernel = draw((2, 7, 6, 4), size, 5)
    padding = size // 2

    def energy(method, x, kernel):
        return jnp.sum(jnp.sin(conv2d(x, kernel, padding=padding, method=method)))

    for argument in (1, 2):
        gradient = jax.jit(jax.grad(energy, argument), static_argnums=0)
        assert_close(gradient(method, x, kernel), gradient("xla", x, kernel))

    def tangent(method):
        def function(x, kernel):
            return conv2d(x, kernel, padding=padding, method=method)

        return jax.jit(lambda *tangents: jax.jvp(function, (x, kernel), tangents)[1])(dx, dkernel)

    assert_close(tangent(method), tangent("xla"))

    def curvature(method):
        gradient = jax.grad(energy, 1)
        return jax.jit(jax.grad(lambda x: jnp.vdot(gradient(method, x, kernel), dx)))(x)

    assert_close(curvature(method), curvature("xla"), 5 * TOLERANCE)


@pytest.mark.parametrize(("size", "method"), [(1, "dot"), (3, "winograd")])
def test_vmap_and_loops(size, method):
    x, kernel = draw((3, 5, 5, 4), size, 4)

    def one(x, kernel):
        return conv2d(x[None], kernel, padding=size // 2, method=method)[0]

    expected = loop_conv2d(x, kernel, 1, size // 2)
    assert_close(jax.jit(jax.vmap(one, (0, None)))(x, kernel), expected)
    kernels = jnp.stack([kernel, 2 * kernel])
    found = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(x, kernels)
    assert_close(found, np.stack([expected, 2 * expected]))
    twice = jax.lax.fori_loop(0, 2, lambda _, x: jax.vmap(one, (0, None))(x, kernel), x)
    assert_close(twice, loop_conv2d(expected, kernel, 1, size // 2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("size", "method"), [(1, "dot"), (3, "auto")])
def test_16_bits(size, method, dtype):
    x, kernel = draw((2, 5, 5, 8), size, 4, dtype)
    found = conv2d(x, kernel, padding=size // 2, method=method)
    assert found.dtype == dtype
    assert_close(found, loop_conv2d(x, kernel, 1, size // 2), 2e-2)


def test_errors_say_what_would_be_right():
    x, kernel = draw((1, 5, 5, 2), 3, 2)
    with pytest.raises(ValueError, match="expected one of auto, xla, dot, winograd"):
        conv2d(x, kernel, method="fft")  # pyright: ignore[reportArgumentType]
    for method, stride, padding in (("winograd", 2, 1), ("winograd", 1, 0), ("dot", 1, 1)):
        with pytest.raises(ValueError, match=f"method='{method}' does not compute a 3x3 kernel"):
            conv2d(x, kernel, stride=stride, padding=padding, method=method)
    with pytest.raises(ValueError, match="2 groups: expected equal strides"):
        conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), feature_group_count=2)


def test_the_layer_computes_this_convolution():
    x, kernel = draw((2, 9, 9, 3), 5, 4)
    bias = jnp.arange(4, dtype=jnp.float32)
    layer = layers.conv(4, 5, stride=2, padding=2, name="conv")
    found = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert_close(found, loop_conv2d(x, kernel, 2, 2) + np.arange(4))


@pytest.mark.parametrize("n", [1, 4, 5, 16, 37])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_derivatives_in_slices(n, size, stride):
    """However many images: gradients and tangents against those of lax, which takes them whole."""
    x, kernel = draw((n, 6, 5, 3), size, 4)
    dx, dkernel = draw((n, 6, 5, 3), size, 4)
    padding = size // 2

    def ours(x, kernel):
        return jnp.sin(conv2d(x, kernel, stride=stride, padding=padding, method="xla"))

    def whole(x, kernel):
        return jnp.sin(
            jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), ((padding, padding),) * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        )  # fmt: skip

    def everything(function):
        def energy(x, kernel):
            return jnp.sum(function(x, kernel))

        gradient = jax.grad(energy, argnums=(0, 1))
        along = jax.jvp(function, (x, kernel), (dx, dkernel))
        kernel_alone = jax.jvp(lambda kernel: function(x, kernel), (kernel,), (dkernel,))
        second = jax.grad(lambda kernel: jnp.sum(jax.grad(energy, argnums=1)(x, kernel) ** 2))
        curvature = jax.jvp(gradient, (x, kernel), (dx, dkernel))
        return gradient(x, kernel), along, kernel_alone, second(kernel), curvature

    found, expected = (jax.jit(functools.partial(everything, f))() for f in (ours, whole))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b)


def test_only_what_is_asked_for_is_computed():
    """No image's gradient where the kernel's is wanted, and the other way round."""
    x, kernel = draw((8, 64, 64, 16), 3, 8)

    def convolutions(argnums):
        gradient = jax.grad(lambda *a: jnp.sum(conv2d(*a, padding=1) ** 2), argnums=argnums)
        return str(jax.make_jaxpr(gradient)(x, kernel)).count("conv_general_dilated[")

    assert convolutions(0) == 2  # forwards, and the images' gradient
    assert convolutions(1) == 3  # forwards, and the kernel's over two slices of four
