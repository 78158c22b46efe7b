"""What a weights file says about its model: how it was built and which images it was trained on.

`train` writes these facts as JSON under `model` in the file's `__metadata__`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deit_fast.config import Deviation, ModelConfig, RunConfig, Share, check_all
from deit_fast.errors import InputError, printable
from deit_fast.runtime.files import parse_object
from deit_fast.runtime.weights_header import read_texts

FACTS_KEY = "model"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model of a weights file.

    Attributes:
        name, args: as in ``ModelConfig``.
        image_size: side of the training images, pixels.
        mean, std: channel statistics of their normalisation, for pixels in [0, 1].
        classes: class names, in the order of the logits.
    """

    name: str
    args: tuple[str, ...]
    image_size: int
    mean: tuple[Share, Share, Share]
    std: tuple[Deviation, Deviation, Deviation]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        check_all(self, f"{FACTS_KEY}.")
        ModelConfig(args=self.args)

    @property
    def is_timm(self) -> bool:
        """Whether ``name`` is timm's; else it is that of a factory."""
        return ":" not in self.name

    def arguments(self) -> dict[str, int]:
        """``args`` by name."""
        return ModelConfig(args=self.args).timm_arguments()


def facts_text(config: RunConfig, classes: Sequence[str]) -> str:
    """The facts of a run's model, as they stand in its weights files."""
    view, model = config.view, config.model
    return json.dumps({
        "name": model.name, "args": model.args, "image_size": view.image_size,
        "mean": view.mean, "std": view.std, "classes": list(classes),
    })  # fmt: skip


def read_facts(path: str | Path) -> ModelFacts | None:
    """The facts in a weights file; None where it is of another program or of an earlier version.

    The file's checksum is not compared here.

    Raises:
        InputError: the file is no safetensors file though it is named so, or a fact is damaged.
        OSError: names the path.
    """
    path = Path(path)
    text = read_texts(path).get(FACTS_KEY, "") if path.suffix == ".safetensors" else ""
    if not text.startswith("{"):
        return None
    where = f"weights file {printable(path)}"
    values = parse_object(text.encode(), f"{where}: its facts about the model")
    names = [item.name for item in dataclasses.fields(ModelFacts)]
    if missing := [name for name in names if name not in values]:
        raise InputError(f"{where}: its facts about the model lack {missing[0]}")
    try:
        return ModelFacts(**{name: values[name] for name in names})
    except InputError as error:
        raise InputError(f"{where}: its facts about the model: {error}") from None
