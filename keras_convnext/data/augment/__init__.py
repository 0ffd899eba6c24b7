"""Training augmentation in TensorFlow graph operations, equal to the published code.

`pixels` has the operations on one image: every bit of the result is what Pillow 13.0.0 computes on x86-64.
`policies` and `erase_and_mix` have plans, which turn random numbers into decisions for many examples at once,
and what carries them out: an example is a pure function of its image and its part of the plan. `transform`
joins them.

Facts carried over: Pillow 13.0.0 (src/libImaging: Geometry.c, Blend.c, Convert.c, Filter.c; src/PIL:
ImageOps.py, ImageEnhance.py), timm 1.0.31 (timm/data: auto_augment.py, random_erasing.py, mixup.py) and
torchvision 0.28.0 (transforms/autoaugment.py, transforms.py).
"""
