"""`python -m keras_convnext`, the same as the command `keras-convnext`."""

import sys

from keras_convnext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
