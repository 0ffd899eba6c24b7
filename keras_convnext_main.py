"""The entry of the command `keras-convnext`: while it is loaded, `keras_convnext` starts without Keras.

`python -m keras_convnext_main` runs the command too. `python -m keras_convnext` imports Keras first.
"""

import sys


def main() -> int:
    """Runs the command with the words of this process and returns its exit code."""
    from keras_convnext.cli.main import main

    return main()


if __name__ == "__main__":
    import keras_convnext_main  # under its own name, by which the package knows the command

    sys.exit(keras_convnext_main.main())
