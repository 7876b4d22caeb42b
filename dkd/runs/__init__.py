"""The files of a run: its directory, its metrics and its log."""
