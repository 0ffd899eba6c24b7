"""Images with boxes: what their classes are, and how a detector is given and gives them."""
