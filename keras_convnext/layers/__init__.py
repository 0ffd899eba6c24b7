"""The layers of ConvNeXt that Keras lacks or computes slowly."""
