"""``python -m ggml_qcache_convert`` is ``convert_to_gguf``."""

import sys

from .cli import main

sys.exit(main())
