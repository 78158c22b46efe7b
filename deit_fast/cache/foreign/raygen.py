"""Embeddings of RayGen (apple/ml-mobileclip-dr), such as DataCompDR: WebDataset shards.

A sample is the members KEY.* of a tar archive that follow one another: `npz`, or `pth.gz` for
bfloat16, with arrays [V, D] such as image_emb (V augmentations), text_emb and syn_text_emb (texts);
`paug.json` with `param_aug`, a list a augmentation, which published shards keep as a text; images,
texts and `json`, which are not read. `config.json` beside the shards names the augmentations.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from deit_fast.cache.foreign.archives import LIMIT, gunzip, read_npz, read_torch_tensors
from deit_fast.cache.foreign.records import Damage, Foreign, Records
from deit_fast.errors import InputError, first_line, printable
from deit_fast.runtime.files import open_regular, parse_object, read_json

if TYPE_CHECKING:
    from deit_fast.data.tar_members import Member

_PARAMETERS, _EMBEDDINGS = "paug.json", ("npz", "pth.gz")
# Augmentations that store something, in the order of their values; config.json has any order.
_WITH_PARAMETERS = (
    "resize", "random_crop", "random_resized_crop", "random_horizontal_flip", "rand_augment",
    "random_erase",
)  # fmt: skip
_RAND_AUGMENT = (  # by the number that is stored
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
    "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip


class RayGen(Foreign):
    """Embeddings of RayGen."""

    name = "RayGen (DataCompDR)"
    replay = (
        "its augmentations are draws of torch's global generator, rendered by torchvision and PIL; "
        "this loader cannot make the same pixels"
    )

    def __init__(self, path: Path, files: list[Path]) -> None:
        super().__init__(path, files)
        self._names = _augmentations(files[0].parent / "config.json")
        self._without = 0
        self._drawn: Counter[str] = Counter()

    @staticmethod
    def recognises(path: Path) -> bool:
        try:
            with open_regular(path) as file:
                from deit_fast.data.tar_members import members  # loads torch

                first = itertools.islice(members(file, str(path)), 64)
                return any(_split(each)[1] in (_PARAMETERS, *_EMBEDDINGS) for each in first)
        except (InputError, OSError):
            return False

    def rows(self) -> list[tuple[str, str]]:
        rows = [("operations", ", ".join(self._names) or "no config.json names them")]
        if self._drawn:
            counts = ", ".join(f"{name} {count}" for name, count in self._drawn.most_common())
            rows.append(("RandAugment", counts))
        if self._without:
            rows.append(("left out", f"{self._without} samples without embeddings"))
        return rows

    def read(self, file: Path) -> Iterator[Records | Damage]:
        seen = set()
        with open_regular(file) as archive:
            from deit_fast.data.tar_members import members  # loads torch

            found = (each for each in members(archive, str(file)) if each.kind != "folder")
            for key, group in itertools.groupby(found, key=lambda each: _split(each)[0]):
                parts = list(group)
                try:
                    if key in seen:
                        raise InputError("the key is there twice")
                    seen.add(key)
                    records = self._sample(archive, key, parts)
                except InputError as error:
                    yield Damage(f"{printable(file)}: {key}: {first_line(error, 300)}")
                    continue
                if records is None:
                    self._without += 1
                else:
                    yield records

    def _sample(self, archive: BinaryIO, key: str, parts: list[Member]) -> Records | None:
        contents = {}
        for member in parts:
            kind = _split(member)[1]
            if kind not in (_PARAMETERS, *_EMBEDDINGS):
                continue
            if member.kind != "file" or member.size > LIMIT or kind in contents:
                raise InputError(f"{kind} is there twice, a link, or has more than {LIMIT} bytes")
            from deit_fast.data.tar_members import read_content  # loads torch

            contents[kind] = read_content(archive, member)
        stored = [kind for kind in _EMBEDDINGS if kind in contents]
        if not stored:
            return None
        if len(stored) > 1:
            raise InputError(f"it has {' and '.join(stored)}")
        try:
            if stored == ["npz"]:
                tensors = read_npz(contents["npz"])
            else:
                tensors = read_torch_tensors(gunzip(contents["pth.gz"]))
        except InputError as error:
            raise InputError(f"{stored[0]}: {error}") from None
        parameters = _parameters(contents[_PARAMETERS]) if _PARAMETERS in contents else None
        views = self._views(tensors, parameters)
        text = "" if parameters is None else json.dumps(parameters)
        named = {name: tensor[None] for name, tensor in sorted(tensors.items())}
        return Records([key], named, {"param_aug": [text]}, views)

    def _views(self, tensors: dict[str, Any], parameters: list[Any] | None) -> int:
        """The number of augmentations, if all agree on it; counts RandAugment's operations."""
        for name, tensor in tensors.items():
            if tensor.dim() != 2 or 0 in tensor.shape:
                raise InputError(f"{name} has shape {list(tensor.shape)}, not [V, D]")
        counts = {name: len(t) for name, t in tensors.items() if name.startswith("image_emb")}
        if parameters is not None:
            counts["param_aug"] = len(parameters)
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise InputError(f"different numbers of augmentations: {said}")
        for values in parameters or []:
            if self._names and len(values) != len(self._names):
                raise InputError(
                    f"an augmentation has {len(values)} operations, config.json {len(self._names)}"
                )
        self._drawn.update(_drawn(parameters or []))
        return max(counts.values(), default=0)


def _split(member: Member) -> tuple[str, str]:
    """Key and extension; as in WebDataset the key ends at the first dot of the file's name."""
    folder, slash, name = printable(os.fsdecode(member.name)).rpartition("/")
    key, _, extension = name.partition(".")
    return f"{folder}{slash}{key}", extension


def _parameters(content: bytes) -> list[Any]:
    value = parse_object(content, _PARAMETERS).get("param_aug")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{_PARAMETERS} is damaged: {printable(error)}") from None
    if not isinstance(value, list) or not all(isinstance(item, list) for item in value):
        raise InputError(f"{_PARAMETERS} has no list of lists param_aug")
    return value


def _drawn(parameters: list[Any]) -> Iterator[str]:
    """Names of RandAugment's operations: pairs of a number and a magnitude."""
    for value in itertools.chain.from_iterable(parameters):
        pairs = value if isinstance(value, list) else []
        if pairs and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            for number, _ in pairs:
                if type(number) is not int or not 0 <= number < len(_RAND_AUGMENT):
                    raise InputError(f"RandAugment has no operation {printable(number)[:20]}")
                yield _RAND_AUGMENT[number]


def _augmentations(config: Path) -> list[str]:
    """Names of the augmentations that store values, in the order of the values."""
    if not config.exists():
        return []
    values = read_json(config, LIMIT)
    on = {name for name, value in values.items()
          if isinstance(value, dict) and value.get("enable", True)}  # fmt: skip
    return [name for name in _WITH_PARAMETERS if name in on]
