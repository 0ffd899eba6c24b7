"""Recipes: training runs as TOML files, one dataclass for each task. No Keras backend is needed."""
