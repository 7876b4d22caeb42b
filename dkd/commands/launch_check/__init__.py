"""`dkd launch-check`: check that a launch can train."""
