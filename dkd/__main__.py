# PYTHON_ARGCOMPLETE_OK
from dkd.cli import main

raise SystemExit(main())
