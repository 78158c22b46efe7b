"""``python -m deit_fast VERB``, also under torchrun."""

from __future__ import annotations

import sys

from deit_fast.cli import main

if __name__ == "__main__":  # worker processes import this file again under another name
    sys.exit(main())
