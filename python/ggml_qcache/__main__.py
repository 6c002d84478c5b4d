"""``python -m ggml_qcache``: the command ``qcache``."""

import sys

from .cli import main

sys.exit(main())
