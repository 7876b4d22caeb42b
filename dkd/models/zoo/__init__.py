"""Models for small images, built as their papers and public implementations build them."""
