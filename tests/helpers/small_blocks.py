"""``deit-fast`` whose caches have blocks of 36 records: ``python -m helpers.small_blocks VERB``."""

from __future__ import annotations

import sys

from deit_fast.cli import main
from deit_fast.config import CodecConfig

BLOCK = 36


def run(arguments: list[str]) -> None:
    CodecConfig.block_records = BLOCK
    sys.exit(main(arguments))


def run_usual(arguments: list[str]) -> None:
    """With blocks as they are."""
    sys.exit(main(arguments))


if __name__ == "__main__":
    run(sys.argv[1:])
