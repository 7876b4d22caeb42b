# PYTHON_ARGCOMPLETE_OK
"""Run the command line, as `python -m dkd`."""

from dkd.cli import main

raise SystemExit(main())
