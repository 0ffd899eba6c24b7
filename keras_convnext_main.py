"""The entry of the command `keras-convnext`: while it is loaded, `keras_convnext` starts without Keras."""


def main() -> int:
    from keras_convnext.cli.main import main

    return main()
