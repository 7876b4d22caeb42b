"""`dkd plan`: what a recipe would move, hold and compute on a cluster."""
