"""`dkd cache`: look at the stored outputs of teachers, check and prune them."""
