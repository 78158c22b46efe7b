"""A student as a folder that timm and the Hugging Face Hub read: config, weights, model card.

The keys are those of timm.models._hub (1.0.31) and of huggingface.co/docs/hub/model-cards. Nothing
is sent to a network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from timm.models import PretrainedCfg

from deit_fast.errors import InputError, printable
from deit_fast.models.student import trained_head
from deit_fast.models.weights import save_weights
from deit_fast.models.weights_facts import ModelFacts
from deit_fast.runtime.environment import package_version
from deit_fast.runtime.files import read_json, write_atomically
from deit_fast.runtime.weights_header import BEST_FILE, EMA_FILE, MODEL_FILE, read_digest
from deit_fast.tools.export.formats import Classifier, texts, timm_arguments, timm_state
from deit_fast.tools.run_folder import folder_of

if TYPE_CHECKING:
    from deit_fast.prediction import Student

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
TAG = "deit_fast"  # in place of that of timm's own weights
_LISTED_CLASSES = 200  # at most, in the model card


def write_hub_folder(student: Student, folder: Path, license: str | None) -> Classifier:
    """Write config.json, model.safetensors and README.md into an empty folder.

    Returns:
        What ``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives.
    """
    state = timm_state(student)
    save_weights(folder / WEIGHTS, state, texts(student, state))
    config = json.dumps(hub_config(student.facts), indent=2) + "\n"
    write_atomically(folder / CONFIG, config.encode())
    write_atomically(folder / CARD, model_card(student, license).encode(errors="backslashreplace"))
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def hub_config(facts: ModelFacts) -> dict[str, Any]:
    """The content of config.json: how timm builds the network, and which images it takes."""
    architecture = facts.name.partition(".")[0]
    arguments = timm_arguments(facts)
    known = timm.models.get_pretrained_cfg(architecture) or PretrainedCfg()
    size = facts.image_size
    return {
        "architecture": architecture,
        "num_classes": len(facts.classes),
        "label_names": list(facts.classes),
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": TAG,
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": known.fixed_input_size,
            "interpolation": "bicubic",
            "crop_pct": facts.eval_crop,
            "crop_mode": "center",
            "mean": list(facts.mean),
            "std": list(facts.std),
            "num_classes": len(facts.classes),
            "first_conv": known.first_conv,
            "classifier": known.classifier,
        },
    }


# ---------------------------------------------------------------------------------------------
# Model card
# ---------------------------------------------------------------------------------------------

_CARD = """---
{front}
---

# {title}

An image classifier with {count} classes: timm's `{name}`, {training}.
Exported by deit_fast {version}.

## Accuracy

{accuracy}

## Use

With timm. Without `pretrained=True` it would have random weights:

```python
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    logits = model(transform(Image.open("photo.jpg").convert("RGB"))[None])
print(model.pretrained_cfg["label_names"][int(logits.argmax())])
```

With deit_fast, whose pixels are the same:

```python
import deit_fast

student = deit_fast.load_student("FOLDER/{weights}")
print(student.classes, student("photo.jpg"))
```

## Input

RGB images of {size} x {size} pixels: the shorter side is resized to {resized} (bicubic), then the
centre is cropped. Pixels in [0, 1] are normalised by mean {mean} and standard deviation {std}.
{heads}
## Classes

{classes}

## Training

{recipe}

**To be filled in:** the training data, where it is from and what may be done with it.

## Limits

**To be filled in:** on which images the model was tried, and on which it fails.

## Licence

{licence}
"""

_ONE_HEAD = """
Of the two heads only the {head} head was trained. Its weights are doubled here and those of the
other are zero, so that timm's mean of both is the trained head's logits.
"""


def model_card(student: Student, license: str | None) -> str:
    """README.md with front matter in YAML. Its texts are those of the run's files, escaped."""
    facts, run = student.facts, folder_of(student.path.absolute())
    result, config = _read(run / "result.json"), _read(run / "config.json")
    title = printable(run.name) or facts.name
    accuracies = _accuracies(student, result)
    head = trained_head(student.model)
    teacher = _text(result, "teacher", "teacher.spec")
    return _CARD.format(
        front=_front_matter(title, accuracies, license),
        title=title,
        count=len(facts.classes),
        name=facts.name,
        training=f"distilled from the teacher `{teacher}`"
        if teacher
        else "trained without a teacher"
        if result and result.get("teacher") is None
        else "of an unrecorded teacher",
        version=package_version("deit-fast") or "",
        accuracy=_accuracy_table(accuracies, result, student.path.name == BEST_FILE),
        weights=WEIGHTS,
        size=facts.image_size,
        resized=int(facts.image_size / facts.eval_crop),
        mean=list(facts.mean),
        std=list(facts.std),
        heads="" if head == "both" else _ONE_HEAD.format(head=head),
        classes=_class_list(facts.classes),
        recipe=_training(config, result),
        licence=printable(license or "Not given."),
    )


def _class_list(classes: Sequence[str]) -> str:
    if len(classes) > _LISTED_CLASSES:
        return f"{len(classes)} names, in the order of the logits: `label_names` of `{CONFIG}`."
    return f"```json\n{json.dumps(classes, ensure_ascii=False, indent=2)}\n```"


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of the run; empty where it is absent or damaged."""
    try:
        return read_json(path)
    except (OSError, InputError):
        return {}


def _text(values: dict[str, Any], *keys: str) -> str:
    """A printable text in nested objects; empty where it is absent."""
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return "" if found is None else printable(found).replace("`", "'")


_TOP1_OF_FILE = {MODEL_FILE: "top1", EMA_FILE: "ema_top1", BEST_FILE: "best_top1"}  # in result.json
_OF_HEADS = {"class head": "top1_class", "distillation head": "top1_distill"}  # of MODEL_FILE


def _accuracies(student: Student, result: dict[str, Any]) -> dict[str, float]:
    """Top-1 accuracies that the run measured with these weights, as shares."""
    name, known = student.path.name, result.get("weights")
    if not isinstance(known, dict) or name not in known or name not in _TOP1_OF_FILE:
        return {}
    if known[name] != read_digest(student.path):
        return {}
    has_two = hasattr(student.model, "head_dist") and trained_head(student.model) == "both"
    keys = {"mean of both heads" if has_two else "the only head": _TOP1_OF_FILE[name]}
    keys |= _OF_HEADS if has_two and name == MODEL_FILE else {}
    return {label: result[key] for label, key in keys.items() if isinstance(result.get(key), float)}


def _accuracy_table(
    accuracies: dict[str, float], result: dict[str, Any], is_best: bool
) -> str:  # fmt: skip
    if not accuracies:
        return "Not recorded for these weights: `deit-fast evaluate` measures it."
    rows = [f"| {name} | {100 * value:.2f} % |" for name, value in accuracies.items()]
    count = _text(result, "samples")
    rows = [f"| logits | top-1 on {count} held-out images |", "|---|---|", *rows]
    if is_best:
        rows += ["", "The weights are those of the run's best evaluation on the same images."]
    return "\n".join(rows)


def _front_matter(title: str, accuracies: dict[str, float], license: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-classification", dataset_type="imagefolder",
            dataset_name="held-out images of the run", metric_type="accuracy", metric_value=value,
            metric_name=f"top-1, {name}",
        )
        for name, value in accuracies.items()
    ]  # fmt: skip
    data = ModelCardData(
        license=license, library_name="timm", pipeline_tag="image-classification",
        tags=["image-classification", "timm", TAG], model_name=title if results else None,
        eval_results=results or None,
    )  # fmt: skip
    return data.to_yaml()


def _training(config: dict[str, Any], result: dict[str, Any]) -> str:
    values = {
        "recipe": _text(config, "recipe"),
        "epochs": _text(result, "epochs"),
        "steps": _text(result, "steps"),
        "batch size": _text(config, "batch_size"),
        "learning rate": _text(config, "optim", "lr"),
        "distillation": _text(config, "loss", "kind"),
        "initial weights": Path(_text(config, "model", "weights")).name,
        "seed": _text(config, "seed"),
        "seed of views": _text(config, "view", "seed"),
    }
    rows = [f"- {name}: {value}" for name, value in values.items() if value]
    return "\n".join(rows) or "Not recorded beside the weights."
