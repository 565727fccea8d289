"""Run `palme-xt` as `python -m palme_xt`."""

import sys

from palme_xt.cli import main

sys.exit(main())
