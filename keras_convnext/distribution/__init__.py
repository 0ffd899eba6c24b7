"""Data and model parallelism: one engine for each backend, and the group of processes of a run."""

# Backend -> engines besides "auto" and "none"; the first is what "auto" takes for several devices.
ENGINES = {
    "jax": ("data_parallel", "model_parallel"),
    "tensorflow": ("mirrored", "multi_worker_mirrored", "tpu"),
    "torch": ("ddp",),
}
