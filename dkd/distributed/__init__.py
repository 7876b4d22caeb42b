"""Between whom a run takes place: the process group, its ranks, and what they report of themselves."""
