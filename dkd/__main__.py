from dkd.cli import main

raise SystemExit(main())
