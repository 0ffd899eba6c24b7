"""Data and model parallelism: one engine for each backend, and the group of processes of a run."""
