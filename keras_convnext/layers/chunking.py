"""Runs a block on a few samples at a time, so that its widest map stays in the processor's caches.

Keras is imported inside functions: `analysis.memory` asks for the chunks of JAX without starting it.
"""

# On PyTorch, by the bytes of a block's widest map. One above WHOLE_BYTES is fresh memory at every step (the C
# library hands large pieces back to the system), and its first touch costs more than the arithmetic on it;
# CHUNK_BYTES keeps close to a second-level cache. Measured at batch 8: 8 MiB give convnextv2_tiny a tenth.
WHOLE_BYTES = 8 * 2**20
CHUNK_BYTES = 5 * 2**20
# On JAX, by the positions N * H * W of the map, whatever its width: above some 3,000 XLA's program for
# depthwise convolution and norm becomes up to three times slower than its chunks together. Measured on
# convnext_atto, nano, tiny and base at batch 2 to 32 (56 x 56 a sample, 28 x 28 two, 14 x 14 eight).
POSITIONS = 2048


def in_chunks(function, x, hidden_channels: int, training: bool = False):
    """Applies `function` to chunks of the batch on a CPU, where that keeps the widest map in the cache.

    The function takes maps (n, H, W, C) to the same shape, each sample by itself, and has at most
    `hidden_channels` inside. In training, where a gradient will be asked for, only JAX does so. It then
    computes a chunk once more in the backward pass instead of keeping its maps, which is faster too, and
    saves memory.
    """
    samples = _samples_in_a_chunk(x, hidden_channels, training)
    if samples == x.shape[0]:
        return function(x)
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.cat([function(chunk) for chunk in x.split(samples)])
    import jax

    chunks = x.reshape(-1, samples, *x.shape[1:])
    return jax.lax.map(jax.checkpoint(function) if training else function, chunks).reshape(x.shape)


def samples_in_a_chunk_of_jax(samples: int, positions: int) -> int:
    """Returns how many samples of `positions` H * W to run at a time: a divisor, as one program runs all."""
    wanted = max(1, POSITIONS // positions)
    return max(divisor for divisor in range(1, min(wanted, samples) + 1) if samples % divisor == 0)


def _samples_in_a_chunk(x, hidden_channels, training):
    import keras

    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        # Sizes of an exported program may be symbols, and a batch that devices share is divided already.
        is_known = all(isinstance(size, int) for size in x.shape)
        is_shared = keras.distribution.distribution() is not None
        if jax.default_backend() == "cpu" and is_known and not is_shared and 0 not in x.shape:
            return samples_in_a_chunk_of_jax(x.shape[0], x.shape[1] * x.shape[2])
    elif backend == "torch" and not training and is_eager_on_cpu(x) and 0 not in x.shape:
        itemsize = 2 if "16" in keras.backend.standardize_dtype(x.dtype) else 4
        sample_bytes = x.shape[1] * x.shape[2] * hidden_channels * itemsize
        if x.shape[0] * sample_bytes > WHOLE_BYTES:
            return min(max(1, CHUNK_BYTES // sample_bytes), x.shape[0])
    return x.shape[0]


def is_eager_on_cpu(x):
    """Whether PyTorch computes with a tensor at once, on the processor: graphs may run elsewhere."""
    import torch

    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
