"""Commands that compute units of work, and the bytes that they leave."""

from __future__ import annotations

import json
from pathlib import Path

from deit_fast.config import RunConfig
from deit_fast.config_file import to_dict


def contents(folder: Path) -> dict[str, bytes]:
    """By path below a folder of caches; without fits, which are notes between processes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".fit-")
    }


def command(config: RunConfig, blocks: str) -> list[str]:
    """As a scheduler starts it; its settings are a file in the configuration's output."""
    Path(config.output).mkdir(exist_ok=True)
    file = Path(config.output) / f"{blocks.replace(':', '-')}.json"
    file.write_text(json.dumps(to_dict(config)))
    return ["precompute", "--config", str(file), "--blocks", blocks]
