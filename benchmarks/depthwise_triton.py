"""The depthwise convolution on a GPU for PyTorch: Triton kernels, written to be measured against the library.

A candidate of `benchmarks/gpu.py`. Maps are channels-last, (N, H, W, C), kernels (K, K, C, 1) as in Keras.
Sums are taken in float32. With TRITON_INTERPRET=1 the same code runs on a CPU, for the tests.
"""

import torch
import triton
import triton.language as tl

from benchmarks.speed.candidates import Candidate

ROWS = 4  # of the result in one program: every value that is read serves up to 4 of the 7 tap rows
REDUCTION_PROGRAMS = (
    2048  # about how many share the sum of the kernel's gradient: 15 for each of 132 processors
)


def candidates(backend: str, device: str) -> list[Candidate]:
    """Returns candidates for `benchmarks.speed.depthwise`: programs of 32, 64 and 128 channels."""
    return [
        Candidate(f"Triton, {block} channels", lambda *inputs, block=block: depthwise(*inputs, block=block))
        for block in (32, 64, 128)
    ]


def depthwise(x, kernel, bias, dilation=1, block=64):
    """The convolution, with gradients of all three tensors.

    Args:
        x: (N, H, W, C), contiguous.
        kernel: (K, K, C, 1), K odd.
        bias: (C,).
        dilation: int, distance between the taps.
        block: int, channels of one program, a power of 2.

    Returns:
        (N, H, W, C), in the dtype of x.
    """
    return _Depthwise.apply(x, kernel, bias, dilation, block)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, bias, dilation, block):
        x, kernel = x.contiguous(), kernel.contiguous()
        ctx.save_for_backward(x, kernel)
        ctx.dilation, ctx.block = dilation, block
        return _correlate(x, kernel, bias, dilation, block)

    @staticmethod
    def backward(ctx, gradient):
        x, kernel = ctx.saved_tensors
        gradient = gradient.contiguous()
        x_gradient = kernel_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            # The kernel turned by 180 degrees takes each output back to the inputs it came from.
            x_gradient = _correlate(gradient, kernel.flip(0, 1).contiguous(), None, ctx.dilation, ctx.block)
        if ctx.needs_input_grad[1]:
            kernel_gradient = _reduce(x, gradient, kernel, ctx.dilation)
        if ctx.needs_input_grad[2]:
            bias_gradient = gradient.sum((0, 1, 2))
        return x_gradient, kernel_gradient, bias_gradient, None, None


def _columns(width):
    """Columns of the map in one program: the whole width of a small map."""
    return min(16, triton.next_power_of_2(width))


def _correlate(x, kernel, bias, dilation, block):
    images, height, width, channels = x.shape
    result = torch.empty_like(x)
    groups = triton.cdiv(height, ROWS * dilation) * dilation
    columns = _columns(width)
    grid = (images * groups * triton.cdiv(width, columns), triton.cdiv(channels, block))
    _correlate_kernel[grid](
        x,
        kernel,
        kernel if bias is None else bias,
        result,
        height,
        width,
        channels,
        SIZE=kernel.shape[0],
        DILATION=dilation,
        HAS_BIAS=bias is not None,
        ROWS=ROWS,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=max(1, block // 8),  # 128 registers for each thread; with half as many they do not suffice
    )
    return result


def _reduce(x, gradient, kernel, dilation, block=32):
    images, height, width, channels = x.shape
    size = kernel.shape[0]
    blocks = triton.cdiv(channels, block)
    parts = min(images * height, max(1, REDUCTION_PROGRAMS // (size * blocks)))
    partial = torch.empty((parts, *kernel.shape), dtype=torch.float32, device=x.device)
    _reduce_kernel[(size, blocks, parts)](
        x,
        gradient,
        partial,
        images * height,
        height,
        width,
        channels,
        SIZE=size,
        DILATION=dilation,
        TAPS=triton.next_power_of_2(size),
        COLUMNS=_columns(width),
        BLOCK=block,
    )
    # Not added up by atomic operations: the order, and so the result, is the same every time.
    return partial.sum(0).to(kernel.dtype)


@triton.jit
def _correlate_kernel(
    x_pointer,
    kernel_pointer,
    bias_pointer,
    result_pointer,
    height,
    width,
    channels,
    SIZE: tl.constexpr,  # noqa: N803 (constants are in capitals, as usual in Triton)
    DILATION: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """ROWS rows, DILATION apart, of COLUMNS columns and BLOCK channels of the result."""
    tiles = tl.cdiv(width, COLUMNS)
    groups = tl.cdiv(height, ROWS * DILATION) * DILATION
    program = tl.program_id(0)
    column = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    group = (program // tiles) % groups
    image = (program // tiles) // groups
    top = (group // DILATION) * ROWS * DILATION + group % DILATION
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = channel < channels
    start = image.to(tl.int64) * height * width * channels
    margin: tl.constexpr = (SIZE - 1) * DILATION // 2

    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_pointer + channel, mask=present, other=0.0).to(tl.float32)
    sums = ()  # tuples grow by +: Triton has no starred expressions
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([COLUMNS, BLOCK], tl.float32) + bias[None, :],)  # noqa: RUF005
    for tap_column in tl.static_range(SIZE):
        weights = ()
        for tap_row in tl.static_range(SIZE):
            place = (tap_row * SIZE + tap_column) * channels + channel
            weight = tl.load(kernel_pointer + place, mask=present, other=0.0).to(tl.float32)
            weights = weights + (weight,)  # noqa: RUF005
        source = column + (tap_column * DILATION - margin)
        inside = ((source >= 0) & (source < width))[:, None] & present[None, :]
        for line in tl.static_range(SIZE + ROWS - 1):
            row = top + (line * DILATION - margin)
            place = start + (row * width + source[:, None]) * channels + channel[None, :]
            mask = inside & (row >= 0) & (row < height)
            values = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
            updated = ()
            for number in tl.static_range(ROWS):
                if line >= number and line < number + SIZE:
                    updated = updated + (sums[number] + values * weights[line - number][None, :],)  # noqa: RUF005
                else:
                    updated = updated + (sums[number],)  # noqa: RUF005
            sums = updated
    for number in tl.static_range(ROWS):
        row = top + number * DILATION
        place = start + (row * width + column[:, None]) * channels + channel[None, :]
        mask = (column < width)[:, None] & present[None, :] & (row < height)
        tl.store(result_pointer + place, sums[number].to(result_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _reduce_kernel(
    x_pointer,
    gradient_pointer,
    partial_pointer,
    lines,
    height,
    width,
    channels,
    SIZE: tl.constexpr,  # noqa: N803
    DILATION: tl.constexpr,  # noqa: N803
    TAPS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One row of the kernel's gradient for BLOCK channels, over every `parts`-th line (image, row)."""
    tap_row = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(2)
    present = channel < channels
    tap = tl.arange(0, TAPS)  # the columns of the kernel, and one to make it a power of 2
    margin: tl.constexpr = (SIZE - 1) * DILATION // 2
    sums = tl.zeros([TAPS, COLUMNS, BLOCK], tl.float32)
    line = part
    while line < lines:  # not a `for`: Triton's interpreter cannot convert its bounds with NumPy 2.4
        row = line % height + tap_row * DILATION - margin
        if row >= 0 and row < height:
            gradient_start = line.to(tl.int64) * width * channels
            x_start = (line - line % height + row).to(tl.int64) * width * channels
            left = 0
            while left < width:
                column = left + tl.arange(0, COLUMNS)
                mask = (column < width)[:, None] & present[None, :]
                place = gradient_start + column[:, None] * channels + channel[None, :]
                gradient = tl.load(gradient_pointer + place, mask=mask, other=0.0).to(tl.float32)
                source = column[None, :] + (tap * DILATION - margin)[:, None]  # (TAPS, COLUMNS)
                inside = (source >= 0) & (source < width) & (tap < SIZE)[:, None]
                place = x_start + source[:, :, None] * channels + channel[None, None, :]
                mask = inside[:, :, None] & present[None, None, :]
                values = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
                sums += values * gradient[None, :, :]
                left += COLUMNS
        line += tl.num_programs(2)
    place = ((part * SIZE + tap_row) * SIZE + tap[:, None]) * channels + channel[None, :]
    mask = (tap < SIZE)[:, None] & present[None, :]
    tl.store(partial_pointer + place, tl.sum(sums, axis=1), mask=mask)
