"""`python -m palme_xt`, the same as `palme-xt`."""

import sys

from palme_xt.cli import main

sys.exit(main())
