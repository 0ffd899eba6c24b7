"""Arithmetic about models and runs: operations, memory, time. Nothing here builds a model."""
