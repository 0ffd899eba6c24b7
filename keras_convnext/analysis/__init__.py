"""Counts operations, memory and time of models and runs from their architecture, without building them."""
