"""Photographs with a class for each pixel: sources, label maps, training and evaluation batches."""
