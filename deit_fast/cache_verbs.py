"""The verbs `deit-fast cache ...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from deit_fast.arguments import columns, number_range, plain, size_text
from deit_fast.config import Count, Deviation, Rate, Seed, Share, Within
from deit_fast.errors import CacheError, CheckFailed, InputError
from deit_fast.inputs import data_at, require_data_root, require_teacher
from deit_fast.runtime.files import require_writable
from deit_fast.storage.urls import is_url

if TYPE_CHECKING:
    from deit_fast.cache.plan import Option

BINS = 12  # of the histogram of entropies


def info(
    path: str,
    /,
    *,
    data_root: str | None = None,
    html: Path | None = None,
) -> str:
    """Describe a cache: codec, views, fingerprint, and statistics of the logits or features.

    They are measured on up to 8,192 records of 64 random blocks: entropy and agreement with the
    labels of logits; size, peaks and share of zeros of features. Caches in the folder's own folders
    are listed.
    Files of RayGen (DataCompDR), FKD and TinyViT are read whole: samples, arrays, augmentations and
    what is damaged. No run can use them.

    Args:
        path: Folder of the cache, or folder or archive of another project.
        data_root: Images or shards that it was made from, to compare the logits with the labels.
        html: HTML file to write as well, with a chart.
    """
    if is_url(path):
        if html is not None or data_root is not None:
            raise InputError(f"--html and --data-root are for a cache on a disk: copy {path} first")
        return columns(_remote_rows(path))
    if html is not None:
        require_writable("--html", html, is_folder=False)
    if data_root is not None:
        require_data_root(data_root, "train")
    from deit_fast import cache
    from deit_fast.cache.foreign import open_foreign
    from deit_fast.cache.format import FILE_NAME

    if (foreign := open_foreign(path)) is not None:
        if html is not None or data_root is not None:
            raise InputError(
                f"--html and --data-root are for a cache; {path} holds files of {foreign.name}"
            )
        from deit_fast.cache.foreign.show import describe

        return columns(describe(foreign))
    nested = _nested_rows(path)
    if nested and html is None and data_root is None and not (Path(path) / FILE_NAME).exists():
        return columns([("path", path), *nested])
    facts = cache.info(path)
    broken = [row for row in facts["views"] if row.get("broken") or "error" in row]
    codec = dict(facts["codec"])
    is_features = "tokens" in codec
    details = ", ".join(f"{key} {plain(value)}" for key, value in codec.items() if key != "name")
    if is_features:
        details = _tokens_text(codec)
    if is_features and data_root is not None:
        raise InputError(
            f"--data-root compares logits with labels, and cache {path} holds features: leave it "
            f"out"
        )
    rows = [
        ("path", facts["path"]),
        ("codec", f"{codec.get('name')} ({details})"),
        ("record", f"{facts['record_bytes']} bytes, {facts['block_records']} records a block"),
        ("samples", str(facts["num_samples"])),
        ("views", f"{len(facts['complete_views'])} complete of {len(facts['views'])}"),
        ("size", size_text(facts["bytes"])),
    ]
    if "teacher.columns" in facts["fingerprint"]:
        outputs = facts["fingerprint"]["teacher.num_classes"]
        rows.insert(2, ("classes", f"{codec['num_classes']} of the teacher's {outputs}"))
    if "order" in facts:
        rows.append(("order", f"{facts['order']}: as training first visits the views"))
    if broken:
        names = ", ".join(row["file"] for row in broken)
        rows.append(("damaged", f"{names}; see `deit-fast cache verify {path}`"))
    rows += _unproved_row(facts)
    for row in facts["views"]:
        if "error" not in row and row["complete"] < row["blocks"]:
            share = f"{row['complete']} of {row['blocks']} blocks"
            rows.append((f"view {row['view']}", f"incomplete: {share}"))
    counts = None
    if facts["complete_views"] and not broken:
        if is_features:
            rows += _feature_rows(path)
        else:
            drawn, counts = _draw_records(path, codec["num_classes"], data_root)
            rows += drawn
    elif data_root is not None or html is not None:
        raise InputError(f"cache {path} has no complete and undamaged view to draw records from")
    rows += nested
    fingerprint = [(key, plain(value)) for key, value in sorted(facts["fingerprint"].items())]
    text = columns(rows)
    if counts:
        text += f"\n\nEntropy of the teacher, nats:\n{_histogram(counts)}"
    if html is not None:
        from deit_fast.runtime.files import write_atomically
        from deit_fast.tools.report.page import build_cache_page

        html.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(html, build_cache_page(rows, counts, fingerprint).encode())
    return f"{text}\n\nFingerprint:\n{columns(fingerprint, indent='  ')}"


def verify(
    path: str,
    /,
    *,
    teacher: str | None = None,
    teacher_classes: str | None = None,
    data_root: str | None = None,
    teacher_mean: tuple[Share, Share, Share] | None = None,
    teacher_std: tuple[Deviation, Deviation, Deviation] | None = None,
    samples: Count = 64,
    threshold: Rate = 1e-3,
    seed: Seed = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> str:
    """Check every block of a cache against its checksum; exit status 1 if one is damaged.

    Caches in the folder's own folders are checked too, such as those of a teacher's features.
    With a teacher, also recompute some records from the images and compare them: exit status 1 if
    one differs by more than the threshold beyond its codec's rounding.

    Args:
        path: Folder of the cache.
        teacher: The teacher that wrote it, with its weights; needs --data-root.
        teacher_classes: File with a line for each output of the teacher, as for `precompute`.
        data_root: The images, or shards, that it was made from.
        teacher_mean: Channel means that the teacher expects, as for `precompute`.
        teacher_std: Channel standard deviations that the teacher expects, as for `precompute`.
        samples: Number of records to recompute.
        threshold: Allowed difference in log-probability beyond the codec's rounding, in nats.
        seed: Seed of the choice of records.
        device: `auto`: CUDA where available.
    """
    if (teacher is None) != (data_root is None):
        raise InputError("--teacher and --data-root go together: the teacher needs the images")
    if is_url(path):
        if teacher is not None:
            raise InputError(f"--teacher is for a cache on a disk: copy {path} first")
        return _verify_remote(path)
    if teacher is not None and data_root is not None:
        require_teacher(teacher)
        require_data_root(data_root, "train")
    from deit_fast import cache
    from deit_fast.cache.format import FILE_NAME, nested_caches
    from deit_fast.runtime.progress import Progress

    folders = [str(item) for item in nested_caches(Path(path))]
    if not folders or teacher is not None or (Path(path) / FILE_NAME).exists():
        folders.insert(0, path)
    total = sum(row["blocks"] for folder in folders for row in cache.info(folder)["views"])
    rows: list[tuple[str, str]] = []
    ok = True
    with Progress("verify", total, unit="block") as bar:
        for folder in folders:
            found = cache.verify(folder, lambda done, total: bar.advance())
            ok = ok and found["ok"]
            rows += _verified_rows(found)
    if ok and teacher is not None and data_root is not None:
        from deit_fast.config import DataConfig
        from deit_fast.tools.verify_against_teacher import verify_against_teacher

        again = verify_against_teacher(
            path, teacher, data_at(DataConfig(workers=0), data_root, "train"),
            teacher_classes=teacher_classes, teacher_mean=teacher_mean, teacher_std=teacher_std,
            samples=samples, threshold=threshold, seed=seed, device=device,
        )  # fmt: skip
        worst = again["worst"]
        rows += [
            ("pixels", f"{again['pixels']} views have the pixels that the teacher saw"),
            ("teacher", f"{again['records']} records recomputed, {again['failed']} differ"),
            ("worst", f"sample {worst['sample']} view {worst['view']}: {worst['error']:.3g} "
                      f"{again['unit']}, allowed {worst['allowed']:.3g}"),
        ]  # fmt: skip
        ok = again["failed"] == 0
    if not ok:
        raise CheckFailed(columns(rows))
    return columns(rows)


def export(path: str, /, *, output: str, views: str | None = None) -> str:
    """Write a cache as Parquet, or as dense tensors in a .safetensors or .pt file.

    So are files of RayGen (DataCompDR), FKD and TinyViT.

    Args:
        path: Folder of the cache, or folder or archive of another project.
        output: File to write; its suffix .parquet, .safetensors or .pt says what.
        views: Only the views A to B-1, written A:B; none: all complete views.
    """
    require_writable("--output", output, is_folder=False)
    from deit_fast.cache.foreign import open_foreign

    requested = number_range("--views", views)
    if (foreign := open_foreign(path)) is None:
        from deit_fast.cache.export import export as run

        result = run(path, output, requested)
    elif requested is None:
        from deit_fast.cache.foreign.show import export as run_foreign

        result = run_foreign(foreign, output)
    else:
        raise InputError(f"--views is for a cache; {path} holds files of {foreign.name}")
    rows = [("wrote", result["out"]), ("records", str(result["records"])),
            ("size", size_text(result["bytes"]))]  # fmt: skip
    return columns(rows)


def copy(source: str, target: str, /) -> str:
    """Copy a cache from a folder to a URL, or back; the same command continues an interrupted one.

    At a URL each block is an object of its own, which is never replaced. In a folder the view files
    are byte for byte those that `precompute` would have written there.

    Args:
        source: Folder or URL, such as s3://bucket/cache. Caches one level below it come too.
        target: URL or folder.
    """
    from deit_fast.cache.copying import copy as run
    from deit_fast.cache.copying import count_blocks
    from deit_fast.runtime.progress import Progress

    if not is_url(target):
        require_writable("TARGET", target)
    with Progress("copy", count_blocks(source), unit="block") as bar:
        counts = run(source, target, bar.advance)
    rows = [("copied", f"{name}: {count} blocks") for name, count in counts.items()]
    return columns([*rows, ("to", target)])


def _remote_rows(url: str) -> list[tuple[str, str]]:
    from deit_fast.cache.copying import caches_at, describe

    rows = []
    for each in caches_at(url):
        found = describe(each)
        rows += [
            ("path", found["path"]),
            ("codec", found["codec"]),
            ("record", f"{found['record_bytes']} bytes"),
            ("samples", str(found["manifest"]["num_samples"])),
            ("views", f"{found['complete_views']} of {found['views']} complete"),
            ("blocks", f"{found['blocks']} of {found['expected']} published"),
            ("size", size_text(found["bytes"])),
        ]
    return rows


def _verify_remote(url: str) -> str:
    from deit_fast.cache.copying import caches_at, describe
    from deit_fast.cache.copying import verify as run
    from deit_fast.runtime.progress import Progress

    urls = caches_at(url)
    rows: list[tuple[str, str]] = []
    ok = True
    total = sum(describe(each)["blocks"] for each in urls)
    with Progress("verify", total, unit="block") as bar:
        for each in urls:
            found = run(each, bar.advance)
            ok = ok and found["ok"]
            rows += _verified_rows(found)
    if not ok:
        raise CheckFailed(columns(rows))
    return columns(rows)


def _verified_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    broken = found["broken"]
    counts = f"{found['complete']} complete, {found['pending']} pending, {len(broken)} broken"
    rows = [("path", found["path"]), ("blocks", f"{found['blocks']}: {counts}")]
    for row in broken:
        where = row["file"] if row["block"] is None else f"{row['file']} block {row['block']}"
        rows.append(("broken", f"{where}: {row['why']}"))
    return rows + _unproved_row(found)


def _tokens_text(codec: dict[str, Any]) -> str:
    return f"tokens {codec['tokens']}, width {codec['width']}"


def _nested_rows(path: str) -> list[tuple[str, str]]:
    """A row for each cache in the folder's own folders."""
    from deit_fast import cache
    from deit_fast.cache.format import nested_caches

    rows = []
    for folder in nested_caches(Path(path)):
        try:
            facts = cache.info(folder)
        except CacheError as error:
            rows.append(("cache", str(error)))
            continue
        codec = facts["codec"]
        kind = f"{codec['name']} ({_tokens_text(codec)})" if "tokens" in codec else codec["name"]
        views = f"{len(facts['complete_views'])} of {len(facts['views'])} views complete"
        size = size_text(facts["bytes"])
        rows.append(
            ("cache", f"{folder}: {kind}, {facts['record_bytes']} bytes a view, {views}, {size}")
        )
    return rows


def plan(
    *,
    bytes_per_image: Count,
    num_samples: Count = 1_281_167,
    num_views: Count = 300,
    repeats: Count = 3,
    classes: Count = 1000,
    width: Count | None = None,
    tokens: Count = 1,
    images_per_s: Annotated[float, Within(0, 1e9, above=True)] | None = None,
) -> str:
    """Propose a codec and a number of views for a budget of bytes; reads and writes nothing.

    Args:
        bytes_per_image: Budget of each image, for all of its views together.
        num_samples: Images of the data set.
        num_views: Distinct views of an image that the run shows: its epochs, or its --num-views.
        repeats: As --view.repeats: views come in groups of so many.
        classes: Classes of the teacher.
        width: Channels of a token of the teacher's features; none: logits alone.
        tokens: Tokens of a view's features: 1 for cls, mean and pooled; patches: grid times grid.
        images_per_s: Rate of the teacher, for its hours. `precompute --dry-run --bytes-per-image`
            takes rate, classes, width and tokens from your teacher.
    """
    from deit_fast.cache.plan import options

    rows = options(
        bytes_per_image, samples=num_samples, views=num_views, repeats=repeats, classes=classes,
        width=width, tokens=tokens, images_per_s=images_per_s,
    )  # fmt: skip
    return plan_table(rows, num_views)


def plan_table(rows: list[Option], num_views: int) -> str:
    """A line for each codec in a budget, then what to take.

    Raises:
        InputError: no view fits.
    """
    from deit_fast.cache.plan import recommend

    lines = [("codec", f"{'bytes a view':>12}  {'views':>9}  {'total':>20}  teacher")]
    for row in rows:
        hours = "" if row.seconds is None else f"{row.seconds / 3600:.1f} h"
        total = f"{row.total} bytes"
        lines.append((row.name, f"{row.bytes_per_view:>12}  {row.views:>9}  {total:>20}  {hours}"))
    for kind, (row, why) in recommend(rows, num_views).items():
        views = "" if row.views == num_views else f" --num-views {row.views}"
        lines.append((f"take, {kind}", f"{row.name}{views}: {why}; {size_text(row.total)} in all"))
    return columns(lines)


def _unproved_row(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [("unproved", facts["unproved"])] if facts["unproved"] else []


# ---------------------------------------------------------------------------------------------
# Statistics of the records
# ---------------------------------------------------------------------------------------------


def _draw_records(
    path: str, num_classes: int, data_root: str | None
) -> tuple[list[tuple[str, str]], list[tuple[float, int]] | None]:
    """Rows about a random sample of the records, and their histogram of entropies.

    The histogram is a list of (middle of the bin in nats, count), or None for decisions alone.
    """
    import numpy as np

    from deit_fast.cache import LogitCache
    from deit_fast.cache.statistics import draw_records

    cache = LogitCache.open(path)
    drawn = draw_records(cache)
    rows, counts = [("drawn", f"{len(drawn.top1)} records")], None
    if drawn.entropy is not None:
        most = float(np.log(num_classes)) or 1.0
        heights, edges = np.histogram(drawn.entropy, BINS, (0.0, most))
        middles = ((edges[:-1] + edges[1:]) / 2).tolist()
        counts = list(zip(middles, heights.tolist(), strict=True))
        mean = f"{drawn.entropy.mean():.3f} nats of {most:.3f}"
        at = "" if drawn.tau == 1 else f", at temperature {drawn.tau:g}"
        rows.append(("entropy", f"{mean} on average{at}"))
    if data_root is not None:
        from deit_fast.config import DataConfig
        from deit_fast.tools.verify_against_teacher import leading_labels

        data = data_at(DataConfig(workers=0), data_root, "train")
        labels = leading_labels(cache, data, drawn.samples, drawn.views)
        share = 100 * float((drawn.top1 == labels).mean())
        rows.append(("agreement", f"{share:.2f} % of top-1 classes are the label of larger weight"))
    return rows, counts


def _feature_rows(path: str) -> list[tuple[str, str]]:
    """Rows about a random sample of the features."""
    from deit_fast.cache import LogitCache
    from deit_fast.cache.statistics import draw_features

    cache = LogitCache.open(path)
    found = draw_features(cache)
    scale = " (as stored, standardised)" if cache.codec.name == "int8-standard" else ""
    return [
        ("drawn", f"{found.records} records, {found.tokens} tokens"),
        ("features", f"rms {found.rms:.4g}, largest {found.largest:.4g}{scale}"),
        ("peaks", f"largest / rms of a token: {found.mean_peak:.1f} on average, "
                  f"{found.largest_peak:.1f} at most"),
        ("zeros", f"{100 * found.zeroed:.2f} % of stored values"),
    ]  # fmt: skip


def _histogram(counts: list[tuple[float, int]]) -> str:
    largest = max(count for _, count in counts) or 1
    return "\n".join(
        f"  {middle:6.2f}  {'#' * round(50 * count / largest):<50} {count}"
        for middle, count in counts
    )
