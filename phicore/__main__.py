"""python -m phicore: the `phicore` command."""

import sys

from phicore.cli import main

sys.exit(main())
