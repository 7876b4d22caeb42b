"""`dkd launch-check`: whether a launch can train."""
