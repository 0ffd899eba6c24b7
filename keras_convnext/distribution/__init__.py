"""Data and model parallelism: one engine for each backend."""
