"""python -m bench roofline [--card H100] [--model deit_small] [--impl fused] [--batch 256]
                         [--gpus 1,8,64] [--json FILE] [--markdown FILE]

The predicted time of a training step: every part is a count (bytes, FLOPs, instructions, launches)
divided by a rate. Counts come from tests/golden/traffic.json (bench/traffic.py), made from the code
that Inductor generates for an H100, and from the model's shapes; the rates and their sources are in
bench/cards.py and bench/step_parts.py. Nothing here is measured. If bench/results has rows of
`python -m bench step` for the same card and model, they are printed with the prediction.

The step is that of `bench step`: DeiT with the teacher's logits in memory, compiled, AdamW. For
other cards the counts are still those of the code for an H100.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import cards, record, traffic
from .step_parts import DEPTH, GROUPS, PIXELS, WIDTHS, Part, Step, device_parts, host_parts
from .traffic import BATCH

RESULTS = Path(__file__).parent / "results"
IMAGES, EPOCHS = 1_281_167, 300  # ImageNet-1k's training images; DeiT's epochs
# ---------------------------------------------------------------------------------------------
# The prediction
# ---------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    step: Step
    device: list[Part]
    host: list[Part]

    @property
    def device_ms(self) -> float:
        return sum(part.us for part in self.device) / 1e3

    @property
    def host_ms(self) -> float:
        return sum(part.us for part in self.host) / 1e3

    @property
    def ms(self) -> float:
        """Time of a step: the longer of device and host, which overlap."""
        return max(self.device_ms, self.host_ms)

    @property
    def images_per_s(self) -> float:
        return self.step.batch / self.ms * 1e3

    @property
    def hours(self) -> float:
        return IMAGES * EPOCHS / self.images_per_s / 3600

    def group_ms(self, group: str) -> float:
        return sum(part.us for part in self.device if part.group == group) / 1e3


def predict(step: Step, table: traffic.Table | None = None) -> Prediction:
    """
    Args:
        table: by default the golden table.

    Raises:
        SystemExit: the table has no such model or implementation.
    """
    table = traffic.read() if table is None else table
    parts = table.get(step.model, {}).get(step.implementation)
    if parts is None:
        raise SystemExit(f"{step.model} {step.implementation}: not in {traffic.GOLDEN.name}")
    whole = traffic.whole_model(parts, DEPTH)
    return Prediction(step, device_parts(step, whole), host_parts(whole))


def measured(step: Step, folder: Path = RESULTS) -> list[str]:
    """Rows of `python -m bench step` for this card, model and batch, newest first."""
    implementation = {"timm": "timm, compiled", "fused": "ours"}.get(step.implementation)
    key = ("step", f"{step.model} student {PIXELS}px B={step.batch}", implementation)
    found = []
    for path in sorted(folder.glob("*/*.json"), reverse=True):
        try:
            content = record.read(path)
        except ValueError:
            continue  # a result of something else
        meta = content["meta"]
        if step.card.name not in meta["device"]:
            continue
        for row in content["rows"]:
            if record.key_of(row) == key and "ms" in row:
                device = f", device {row['device_ms']:.2f} ms" if "device_ms" in row else ""
                found.append(f"measured {row['ms']:.2f} ms{device}: {meta['device']}, commit "
                             f"{meta['commit']}, {meta['date']}")  # fmt: skip
    return found


def as_text(prediction: Prediction) -> str:
    step = prediction.step
    lines = [
        f"PREDICTED, not measured: {step.model}, {step.implementation}, batch {step.batch}, "
        f"{step.card.name}",
        "",
    ]
    for group in GROUPS:
        lines.append(f"{group:12s} {prediction.group_ms(group):8.2f} ms")
        lines += (line(part) for part in prediction.device if part.group == group)
    lines.append(f"{'host':12s} {prediction.host_ms:8.2f} ms, beside the device's work")
    lines += (line(part) for part in prediction.host)
    lines += [
        "",
        f"predicted step {prediction.ms:.2f} ms (device {prediction.device_ms:.2f}, host "
        f"{prediction.host_ms:.2f}), {prediction.images_per_s:,.0f} images/s, "
        f"{EPOCHS} epochs of ImageNet in {prediction.hours:.1f} hours",
    ]
    return "\n".join([*lines, *(measured(step) or ["measured: nothing for this card yet"])])


def line(part: Part) -> str:
    time, name = f"{part.us / 1e3:8.3f} ms", f"{part.phase} {part.name}"
    return f"  {time}  {part.amount:>26s} at {part.rate:<12s} {name}"


def as_json(prediction: Prediction) -> dict[str, Any]:
    step = prediction.step
    return {
        "predicted": True,
        "card": step.card.name, "model": step.model, "impl": step.implementation,
        "batch": step.batch, "ms": prediction.ms, "device_ms": prediction.device_ms,
        "host_ms": prediction.host_ms, "images_per_s": prediction.images_per_s,
        "hours": prediction.hours, "measured": measured(step),
        "parts": [part._asdict() for part in (*prediction.device, *prediction.host)],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------

MARKS = "<!-- made by python -m bench roofline: begin -->", "<!-- bench roofline: end -->"


def markdown_rows(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def as_markdown() -> str:
    """The predicted step on each card, and ours for DeiT-S on several H100, as two tables."""
    from . import scaling

    several = Step(cards.CARDS["H100"], "deit_small", "fused", BATCH)
    rows = []
    for card in cards.CARDS.values():
        for model in WIDTHS:
            for implementation in traffic.IMPLEMENTATIONS:
                if implementation == "fused-bf16-mlp" and card.name == "A100":
                    continue  # without TMA mlp_backward changes nothing
                found = predict(Step(card, model, implementation, BATCH))
                groups = (f"{found.group_ms(group):.2f}" for group in GROUPS[:4])
                rest = sum(found.group_ms(group) for group in GROUPS[4:])
                rows.append([card.name, model, implementation, *groups, f"{rest:.2f}",
                             f"{found.host_ms:.1f}", f"{found.ms:.1f}",
                             f"{found.images_per_s:,.0f}", f"{found.hours:.1f}"])  # fmt: skip
    head = ("card", "model", "step", "GEMM, ms", "elementwise", "attention", "launches", "rest",
            "host", "step, ms", "images/s", "hours")  # fmt: skip
    return "\n".join(
        [
            "<!-- computed: python -m bench roofline -->",
            *markdown_rows(head, rows),
            "",
            "<!-- computed: python -m bench roofline --gpus 1,8,64 -->",
            *scaling.as_markdown(predict(several), (1, 8, 64)),
        ]
    )


def write_markdown(path: Path) -> None:
    """Replace the tables of a page.

    Raises:
        SystemExit: there is no such page, or it lacks the marks.
    """
    if not path.is_file():
        raise SystemExit(f"{path}: not found")
    try:
        record.replace_between(path, MARKS, as_markdown())
    except ValueError as error:
        raise SystemExit(str(error)) from None


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--card", default="H100", help=f"one of {', '.join(cards.CARDS)}")
    parser.add_argument("--model", choices=WIDTHS, default="deit_small")
    parser.add_argument("--impl", choices=traffic.IMPLEMENTATIONS, default="fused")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a step on one GPU")
    parser.add_argument("--gpus", help="also predict scaling: numbers of GPUs, such as 1,8,64")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the prediction there too")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write all cards as tables there; end"
    )
    options = parser.parse_args(arguments[1:])
    if options.markdown:
        write_markdown(options.markdown)
        return
    record.require_folder(options.json)
    if options.batch < 1:
        parser.error(f"--batch must be positive, not {options.batch}")
    step = Step(cards.find_card(options.card), options.model, options.impl, options.batch)
    prediction = predict(step)
    print(as_text(prediction))
    content = as_json(prediction)
    if options.gpus:
        from . import scaling

        try:
            counts = [int(count) for count in options.gpus.split(",")]
        except ValueError:
            parser.error(f"--gpus takes numbers, such as 1,8,64, not {options.gpus!r}")
        rows = scaling.predict(prediction, counts)
        print("\n" + scaling.as_text(rows))
        content["gpus"] = [row._asdict() for row in rows]
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")
