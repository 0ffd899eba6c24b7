"""The depthwise convolution on a GPU for JAX: Pallas kernels, written to be measured against XLA.

A candidate of `benchmarks/gpu.py`. Maps are channels-last, (N, H, W, C), kernels (K, K, C, 1) as in Keras.
Sums are taken in float32. The maps are padded by XLA first, to whole tiles and with the convolution's border,
so that no load needs a mask; the padding is part of the time. On a CPU the kernels are interpreted, for the
tests.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas
from jax.experimental.pallas import triton

from benchmarks.speed.candidates import Candidate

ROWS = 4  # of the result in one program: every value that is read serves up to 4 of the 7 tap rows
COLUMNS = 16  # at most, of the map in one program
PARTS = 64  # at most, of the lines that share the sum of the kernel's gradient


def candidates(backend: str, device: str) -> list[Candidate]:
    """Returns candidates for `benchmarks.speed.depthwise`: programs of 32, 64 and 128 channels."""
    return [
        Candidate(f"Pallas, {block} channels", functools.partial(depthwise, block=block))
        for block in (32, 64, 128)
    ]


def depthwise(x, kernel, bias, dilation=1, block=64):
    """The convolution, with gradients of all three arrays.

    Args:
        x: (N, H, W, C).
        kernel: (K, K, C, 1), K odd.
        bias: (C,).
        dilation: int, distance between the taps.
        block: int, channels of one program at most: the largest power of 2 up to it that divides C is taken.

    Returns:
        (N, H, W, C), in the dtype of x.
    """
    # The bias outside the kernel: XLA fuses it into what follows.
    return _convolve(x, kernel[..., 0], dilation, math.gcd(x.shape[-1], block)) + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, dilation, block):
    return _correlate(x, kernel, dilation, block)


def _forward(x, kernel, dilation, block):
    return _correlate(x, kernel, dilation, block), (x, kernel)


def _backward(dilation, block, residuals, gradient):
    x, kernel = residuals
    # The kernel turned by 180 degrees takes each output back to the inputs it came from.
    return _correlate(gradient, kernel[::-1, ::-1], dilation, block), _reduce(x, gradient, kernel, dilation)


_convolve.defvjp(_forward, _backward)


def _tiles(width):
    """(columns of a tile, tiles across): a tile is a power of 2 wide, as Triton needs it."""
    columns = min(COLUMNS, 1 << (width - 1).bit_length())
    return columns, -(-width // columns)


def _padded(x, margin, height, width):
    """`x` with `margin` zeros around it, and more below and to the right for `height` x `width` outputs."""
    below, right = height - x.shape[1], width - x.shape[2]
    return jnp.pad(x, ((0, 0), (margin, margin + below), (margin, margin + right), (0, 0)))


def _call(kernel, shape, dtype, grid, block):
    return pallas.pallas_call(
        kernel,
        jax.ShapeDtypeStruct(shape, dtype),
        grid=grid,
        # 128 registers for each thread, whatever the block; with half as many warps they do not suffice.
        compiler_params=triton.CompilerParams(num_warps=max(1, block // 8)),
        interpret=jax.default_backend() == "cpu",
    )


def _correlate(x, kernel, dilation, block):
    images, height, width, channels = x.shape
    size = kernel.shape[0]
    columns, across = _tiles(width)
    groups = -(-height // (ROWS * dilation)) * dilation  # of ROWS rows, `dilation` apart
    whole = (groups * ROWS, across * columns)
    source = _padded(x, (size - 1) * dilation // 2, *whole)

    def program(x_ref, kernel_ref, result_ref):
        image, group = pallas.program_id(0) // groups, pallas.program_id(0) % groups
        top = (group // dilation) * ROWS * dilation + group % dilation
        left = pallas.program_id(1) * columns
        channel = pallas.ds(pallas.program_id(2) * block, block)
        sums = [jnp.zeros((columns, block), jnp.float32)] * ROWS
        for tap_column in range(size):
            weights = [kernel_ref[tap_row, tap_column, channel] for tap_row in range(size)]
            column = pallas.ds(left + tap_column * dilation, columns)
            for line in range(size + ROWS - 1):
                values = x_ref[image, top + line * dilation, column, channel].astype(jnp.float32)
                for number in range(max(0, line - size + 1), min(ROWS, line + 1)):
                    weight = weights[line - number].astype(jnp.float32)
                    sums[number] += values * weight[None, :]
        for number in range(ROWS):
            row, column = top + number * dilation, pallas.ds(left, columns)
            result_ref[image, row, column, channel] = sums[number].astype(result_ref.dtype)

    shape = (images, *whole, channels)
    result = _call(program, shape, x.dtype, (images * groups, across, channels // block), block)(
        source, kernel
    )
    return result[:, :height, :width]


def _reduce(x, gradient, kernel, dilation):
    images, height, width, channels = x.shape
    size, block = kernel.shape[0], math.gcd(channels, 32)
    columns, across = _tiles(width)
    source = _padded(x, (size - 1) * dilation // 2, height, across * columns)
    gradient = _padded(gradient, 0, height, across * columns)  # zeros add nothing
    parts = math.gcd(images * height, PARTS)
    lines = images * height // parts  # (image, row) pairs that one program sums over

    def program(x_ref, gradient_ref, partial_ref):
        tap_row, part = pallas.program_id(0), pallas.program_id(2)
        channel = pallas.ds(pallas.program_id(1) * block, block)

        def add_line(number, sums):
            line = part * lines + number
            image, row = line // height, line % height
            for tile in range(across):
                left = tile * columns
                change = gradient_ref[image, row, pallas.ds(left, columns), channel].astype(jnp.float32)
                sums = tuple(
                    total
                    + change
                    * x_ref[
                        image, row + tap_row * dilation, pallas.ds(left + tap * dilation, columns), channel
                    ].astype(jnp.float32)
                    for tap, total in enumerate(sums)
                )
            return sums

        start = (jnp.zeros((columns, block), jnp.float32),) * size
        for tap, total in enumerate(jax.lax.fori_loop(0, lines, add_line, start)):
            partial_ref[part, tap_row, tap, channel] = jnp.sum(total, axis=0)

    shape = (parts, *kernel.shape)
    partial = _call(program, shape, jnp.float32, (size, channels // block, parts), block)(source, gradient)
    return jnp.sum(partial, axis=0).astype(kernel.dtype)
