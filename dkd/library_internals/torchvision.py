"""Use torchvision's private names. They were read in torchvision 0.29."""

LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
"""Names under which data sets of torchvision keep their labels. Some keep the labels under the private name alone, and
reading labels from the items instead would decode every image."""
