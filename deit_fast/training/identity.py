"""What a run is made of: facts about its data and its teacher, as JSON values by short name.

Checkpoints and weights carry them: `data.*` and `val.*` of ``data.fingerprint.identify``,
`teacher.*` and `cache.*` of ``RunTeacher.identity``, `model.weights` of ``create_state``. A run
resumes only with the same ones: paths may change, content may not, unless the user accepts the
change by its name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from deit_fast.errors import InputError

log = logging.getLogger("deit_fast")

FEATURES = "teacher.features"
"""Which features the projectors learn, in their order. Absent where there are none. A run that
learns others is another one, which cannot be accepted: its projectors would not fit them."""


def in_short(facts: Mapping[str, Any]) -> dict[str, str]:
    """A short digest of each fact, by which ranks compare theirs."""
    texts = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:8] for name, text in texts.items()}


def require_same(
    saved: Mapping[str, Any], own: Mapping[str, Any], accepted: Iterable[str], where: str
) -> None:
    """Compare the facts of a checkpoint with those of the run that resumes from it.

    Args:
        accepted: names of facts that may differ.
        where: the checkpoint, for messages.

    Raises:
        InputError: names each fact that differs, with both values.
    """
    classes = len(saved["data.classes"]), len(own["data.classes"])
    if classes[0] != classes[1]:
        raise InputError(
            f"{where} has {classes[0]} classes, the data has {classes[1]}: restore the data, or "
            f"start another run with its weights by --model.weights and another --output"
        )
    differing = _differences(saved, {key: own[key] for key in own if key != FEATURES})
    taken = [differing.pop(name) for name in sorted(accepted) if name in differing]
    if differing:
        raise InputError(
            f"{where} is of a run that was made of something else "
            f"({'; '.join(differing.values())}): restore it, choose another --output, or go on "
            f"with the change by --accept-change {' '.join(differing)}"
        )
    if taken:
        log.warning("%s: accepted that the run goes on with %s", where, "; ".join(taken))


def features_text(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """How the features that two runs learn differ; empty where they do not."""
    old, new = saved.get(FEATURES, []), own.get(FEATURES, [])
    return "" if old == new else f"features {_in_words(old)} there, {_in_words(new)} here"


def _in_words(features: list[dict[str, Any]]) -> str:
    """Each feature's name, and what is not as usual."""
    usual = (("norm", True), ("reduce", "none"))
    texts = []
    for fields in features:
        named = {key.removeprefix("target."): value for key, value in fields.items()}
        name = str(named.pop("name", "unknown"))
        shown = [f"{key}={value}" for key, value in sorted(named.items())
                 if value is not None and (key, value) not in usual]  # fmt: skip
        texts.append(" ".join([name, *shown]))
    return ", ".join(texts) or "none"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Texts about the facts that differ, by name. One that either side lacks is not compared: a
    run may change between a teacher and a cache of its logits."""
    names = [name for name in old if name in new and old[name] != new[name]]
    found = {}
    for name in names:
        pair = old[name], new[name]
        if name.endswith(".pixels"):
            # Where files differ by name or size, their pixels need no words.
            if name.replace("pixels", "images") not in names and (text := _pixels(*pair)):
                found[name] = f"{name}: {text}"
        elif name == "data.classes":
            found[name] = f"{name}: {_classes(*pair)}"
        else:
            found[name] = f"{name} {_short(pair[0])} there, {_short(pair[1])} here"
    return found


def _pixels(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Empty where only images differ that could not be read at one of both times."""
    changed = [path for path in old if path in new and old[path] != new[path]]
    if not changed:
        return ""
    return f"{len(changed)} of {len(old)} images checked have other pixels, such as {changed[0]}"


def _classes(old: list[str], new: list[str]) -> str:
    different = [label for label, pair in enumerate(zip(old, new, strict=True)) if len({*pair}) > 1]
    label = different[0]
    return f"{len(different)} differ, label {label} is {old[label]!r} there, {new[label]!r} here"


def _short(value: Any) -> str:
    """A value's JSON with the first digits of digests."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b", r"\1", json.dumps(value))
