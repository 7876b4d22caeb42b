"""Training: the loop, and what it is made of. May know every room but the reports."""
