"""What a weights file says about its model: how it was built and which images it was trained on.

`train` writes these facts as JSON under `model` in the `__metadata__` of safetensors files. Its
checkpoints hold the run's configuration and identity, from which the same facts are read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit_fast.config import (
    DataConfig,
    Deviation,
    EvalCrop,
    Head,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Residual,
    RunConfig,
    Share,
    Width,
    check_all,
)
from deit_fast.config_file import by_dotted_key, from_earlier, to_dict
from deit_fast.errors import InputError, printable
from deit_fast.models.pretrained import pretrained_name
from deit_fast.runtime.files import parse_object, read_json
from deit_fast.runtime.torch_files import map_torch
from deit_fast.runtime.weights_header import HEAD_KEY, WEIGHTS_FILES, read_texts, split_key

FACTS_KEY = "model"
_SETTINGS = (  # the facts that are settings of the run
    "model.name", "model.args", "model.head", "model.wide", "model.fused", "model.kernels",
    "model.residual", "model.pad_head",
    "view.image_size", "view.mean", "view.std", "data.eval_crop",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model of a weights file.

    Attributes:
        name, args: as in ``ModelConfig``.
        image_size: side of the training images, pixels.
        mean, std: channel statistics of their normalisation, for pixels in [0, 1].
        classes: class names, in the order of the logits.
        eval_crop: as in ``DataConfig``.
        fused, kernels, residual, pad_head, head, wide: as in ``ModelConfig``.
    """

    name: str
    args: tuple[str, ...]
    image_size: int
    mean: tuple[Share, Share, Share]
    std: tuple[Deviation, Deviation, Deviation]
    classes: tuple[str, ...]
    # Files of earlier versions do not say these.
    eval_crop: EvalCrop = DataConfig.eval_crop
    fused: bool = ModelConfig.fused
    kernels: tuple[str, ...] | None = ModelConfig.kernels
    residual: Residual = ModelConfig.residual
    pad_head: bool = ModelConfig.pad_head
    head: Head = ModelConfig.head
    wide: Width | None = ModelConfig.wide

    def __post_init__(self) -> None:
        check_all(self, f"{FACTS_KEY}.")
        ModelConfig(args=self.args, head=self.head, wide=self.wide)

    @property
    def is_timm(self) -> bool:
        """Whether ``name`` is timm's; else it is that of a factory."""
        return ":" not in self.name

    def arguments(self) -> dict[str, int]:
        """``args`` by name."""
        return ModelConfig(args=self.args).timm_arguments()


def facts_text(config: RunConfig, classes: Sequence[str]) -> str:
    """The facts of a run's model, as they stand in its weights files."""
    return _facts_text(by_dotted_key(to_dict(config)), classes)


def _facts_text(settings: dict[str, Any], classes: Sequence[str]) -> str:
    """``facts_text`` of settings by dotted key."""
    facts = {key.partition(".")[2]: settings[key] for key in _SETTINGS}
    return json.dumps(facts | {"classes": list(classes)})


def file_texts(path: str | Path) -> dict[str, str]:
    """The texts about its model in a weights file of `train`, of either kind.

    Those of a checkpoint are made from its configuration; its tensors are not read. Checksums are
    not compared here. A file of another program has none, or its own.

    Args:
        path: FILE or FILE#KEY; timm's pretrained weights, `timm:NAME`, have none.

    Raises:
        InputError: the file is no safetensors file though it is named so, or the checkpoint's
            configuration is damaged.
        OSError: names the path.
    """
    if pretrained_name(path) is not None:
        return {}
    file, _ = split_key(path)
    if file.suffix == ".safetensors":
        return read_texts(file)
    saved = map_torch(file)
    return _checkpoint_texts(saved, f"weights file {printable(file)}") if _is_own(saved) else {}


def _is_own(saved: Any) -> bool:
    """Whether it is what a checkpoint of `train` holds."""
    return isinstance(saved, dict) and all(
        isinstance(saved.get(key), str) for key in ("config", "identity")
    )


def _checkpoint_texts(saved: dict[str, Any], where: str) -> dict[str, str]:
    classes = parse_object(saved["identity"].encode(), f"{where}: its identity").get("data.classes")
    with _settings(saved, where) as settings:
        loss = LossConfig(kind=settings["loss.kind"], alpha=settings["loss.alpha"])
    texts = {"identity": saved["identity"], HEAD_KEY: loss.trained_head}
    return texts | ({FACTS_KEY: _facts_text(settings, classes)} if classes else {})


@contextmanager
def _settings(saved: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """The settings of a checkpoint's run by dotted key; names them where one is out of range."""
    values = parse_object(saved["config"].encode(), f"{where}: its configuration")
    try:
        yield by_dotted_key(to_dict(RunConfig())) | by_dotted_key(from_earlier(values))
    except InputError as error:
        raise InputError(f"{where}: its configuration: {error}") from None


def initial_share(saved: Mapping[str, Any], path: str | Path) -> float:
    """``OptimConfig.initial_share`` of the average in a checkpoint of `train`; 0 in others.

    Args:
        saved: what the file holds.

    Raises:
        InputError: the checkpoint's configuration is damaged.
    """
    if not _is_own(saved) or not isinstance(saved.get("step"), int):
        return 0.0
    names = ("ema_decay", "ema_warmup")
    with _settings(saved, f"weights file {printable(path)}") as settings:
        optim = OptimConfig(**{name: settings[f"optim.{name}"] for name in names})
    return optim.initial_share(saved["step"])


def read_facts(path: str | Path) -> ModelFacts | None:
    """The facts in a weights file; None where it is of another program or of an earlier version.

    Raises:
        InputError: as ``file_texts``, or a fact is damaged.
        OSError: names the path.
    """
    text = file_texts(path).get(FACTS_KEY, "")
    if not text.startswith("{"):
        return None
    where = f"weights file {printable(path)}"
    values = parse_object(text.encode(), f"{where}: its facts about the model")
    fields = dataclasses.fields(ModelFacts)
    needed = [item.name for item in fields if item.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise InputError(f"{where}: its facts about the model lack {missing[0]}")
    try:
        return ModelFacts(**{x.name: values[x.name] for x in fields if x.name in values})
    except InputError as error:
        raise InputError(f"{where}: its facts about the model: {error}") from None


def identity_of(texts: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """What the run was made of that wrote a weights file, from the file's texts; may be empty.

    Raises:
        InputError: it is damaged.
    """
    text = texts.get("identity", "{}")
    return parse_object(text.encode(), f"weights file {printable(path)}: its identity")


def class_names(path: str | Path) -> list[str] | None:
    """Names of the classes, in the order of the logits, that a file of `train` or its run says.

    Weights of the first versions have no names; the result.json of their run has them.

    Args:
        path: FILE or FILE#KEY.

    Raises:
        InputError: as ``file_texts``, or the identity or result.json is damaged.
    """
    names: Any = identity_of(file_texts(path), path).get("data.classes")
    if names is None:
        names = _classes_of_run(split_key(path)[0])
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names or None if is_list and len(set(names)) == len(names) else None


def _classes_of_run(file: Path) -> Any:
    """Those in the result.json of a run that wrote the file, unless its weights have an identity.

    A result that names the digests of its weights is of a later version, whose weights have one.
    """
    is_checkpoint = file.suffix == ".pt" and file.parent.name == "checkpoints"
    if not is_checkpoint and file.name not in WEIGHTS_FILES.values():
        return None
    path = (file.parent.parent if is_checkpoint else file.parent) / "result.json"
    result = read_json(path) if os.path.lexists(path) else {}
    return None if "weights" in result else result.get("classes")
