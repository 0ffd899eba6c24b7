"""Scores, features and heat maps of a model."""
