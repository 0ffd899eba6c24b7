"""Detection: Mask R-CNN and Cascade Mask R-CNN, objects of an image with boxes, classes and masks."""

from keras_convnext.detection.rcnn import Detector, MaskRCNN, with_sizes

__all__ = ["Detector", "MaskRCNN", "with_sizes"]
