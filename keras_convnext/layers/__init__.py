"""The layers of ConvNeXt that Keras lacks or computes slowly.

`normalization` has the norms, `residual` has LayerScale and stochastic depth, `depthwise` and `pointwise`
have the fast convolutions and matrix products. `chunking` runs a block on a few samples at a time, and
`bfloat16` computes in float32 where a processor lacks bfloat16.
"""
