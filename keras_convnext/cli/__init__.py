"""The command `keras-convnext`: one module for each group of commands."""
