"""Files for other runtimes: SavedModel, LiteRT, ONNX, OpenVINO, PyTorch and a web page."""
