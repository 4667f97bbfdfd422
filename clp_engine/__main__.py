"""python -m clp_engine: the command line."""

import sys

from clp_engine.cli.main import main

sys.exit(main())
