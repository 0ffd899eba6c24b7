"""The layers that Keras lacks: norms, LayerScale, stochastic depth, fast convolutions and products."""
