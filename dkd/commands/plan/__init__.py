"""`dkd plan`: calculate and print what a recipe would cost on a cluster."""
