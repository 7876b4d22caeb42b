"""A loss of logits that asks for the labels, too."""


class OfLabels:
    """Never called: what it asks for is read from its parameters."""

    def __call__(self, student, teacher, labels):
        raise AssertionError
