"""A teacher whose classes are not the data's: names, files and timm's lists choose its outputs.

DEIT_FAST_SWEEP=N tries N random pairs of class lists instead of 150.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import nn

from deit_fast.cache import LogitCache, codec_from_config
from deit_fast.cli import main
from deit_fast.config import CodecConfig, RunConfig, ViewConfig
from deit_fast.errors import CacheMismatch, InputError
from deit_fast.kernels.distillation_loss import TopK
from deit_fast.models import teacher as teacher_module
from deit_fast.models import teacher_classes
from deit_fast.models.teacher import Teacher, load_class_matched_teacher, load_teacher
from deit_fast.precomputation import precompute
from deit_fast.precompute_job import Job
from deit_fast.recipes import digits_student
from deit_fast.tools.analysis.runs import analyze
from deit_fast.tools.verify_against_teacher import verify_against_teacher
from deit_fast.training.loop import train
from helpers.images import picture
from helpers.runs import TWO_BLOCKS

SPEC = "test_teacher_classes:flat"
VIEW = ViewConfig(image_size=16)
TENCH, SPANIEL, PHONE = "n01440764", "n02102040", "n03000684"


def flat(num_classes: int) -> nn.Module:
    """One linear layer on 16-pixel images; its weights depend on the number of classes alone."""
    torch.manual_seed(num_classes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))
    model.num_classes = num_classes
    return model


def write_images(root: Path, classes: list[str], per_class: int = 4) -> Path:
    for split, seed in (("train", 0), ("val", 500)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                image = picture(seed + 10 * label + number, 16, 16)
                image.save(root / split / name / f"{number}.png")
    return root


def write_lines(path: Path, names: list[str]) -> str:
    path.write_text("".join(f"{name}\n" for name in names))
    return str(path)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """About a teacher's classes."""
    texts = [record.getMessage() for record in caplog.records]
    return [text for text in texts if text.startswith("teacher ") and " classes" in text]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "deit_fast")
    return caplog


# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------


def named(classes: list[str], names: list[str] | None, monkeypatch) -> Teacher:
    """The matched teacher whose weights say these names."""

    def load(spec: str, *, num_classes: int, **_) -> Teacher:
        teacher = Teacher(flat(len(names) if names is not None else num_classes), spec)
        teacher.class_names = names
        return teacher

    monkeypatch.setattr(teacher_module, "load_teacher", load)
    return load_class_matched_teacher(RunConfig(view=VIEW, teacher=SPEC), classes)


def test_equal_names_change_nothing_and_say_nothing(monkeypatch, said):
    teacher = named(["b", "a"], ["b", "a"], monkeypatch)
    assert teacher.columns is None and messages(said) == []
    assert "teacher.columns" not in teacher.fingerprint()


def test_equal_names_in_another_order_are_permuted_and_it_is_said_once(monkeypatch, said):
    teacher = named(["a", "b", "c"], ["b", "c", "a"], monkeypatch)
    images = torch.randn(5, 3, 16, 16)
    assert torch.equal(teacher(images), teacher.model(images)[:, [2, 0, 1]])
    assert messages(said) == [f"teacher {SPEC}: its 3 classes have another order, taken by name"]


def test_without_names_on_one_side_the_order_is_taken_and_it_is_said_once(monkeypatch, said):
    for classes, names in ((["a", "b"], None), (["0", "1"], ["a", "b"]), (["a", "b"], ["0", "1"])):
        said.clear()
        teacher = named(classes, names, monkeypatch)
        assert teacher.columns is None
        assert len(messages(said)) == 1 and "in their order" in messages(said)[0]


def test_numbers_are_names_where_all_are_found(monkeypatch):
    names = [str(label) for label in range(10)]
    assert named(["3", "7"], names, monkeypatch).columns.tolist() == [3, 7]


@pytest.mark.parametrize(
    ("classes", "names", "text"),
    [
        (["cat", "dog"], ["cat", "dot", "eel"], r"lacks 1 of the data's 2 classes, such as 'dog' "
         r"\(did you mean dot\?\): fine-tune it first: .*; or say which output is which by"),
        (["cat", "dog"], ["cat", "cow"], "lacks 1 of the data's 2 classes, such as 'dog'"),
        (["a", "b"], ["a", "b", "a"], "has class 'a' twice, as outputs 0 and 2"),
        (["a", "a"], ["a", "b"], "classes 0 and 1 of the data are both named 'a'"),
        (["a", "b"], ["0", "1", "2"], "has 3 classes, the data set has 2, and not both have name"),
    ],
    ids=["lacking", "another-set", "twice-there", "twice-here", "counts"],
)  # fmt: skip
def test_what_names_cannot_decide_is_refused_in_one_line(classes, names, text, monkeypatch):
    with pytest.raises(InputError, match=text) as error:
        named(classes, names, monkeypatch)
    assert SPEC in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# A file of the user
# ---------------------------------------------------------------------------------------------


def test_a_file_names_the_outputs(tmp_path, said):
    lines = write_lines(tmp_path / "map.txt", ["-", "dog", "-", "cat", ""])
    config = RunConfig(view=VIEW, teacher=SPEC, teacher_classes=lines)
    teacher = load_class_matched_teacher(config, ["cat", "dog"])
    assert teacher.columns.tolist() == [3, 1]
    assert (teacher.num_classes, teacher.num_outputs) == (2, 5)
    assert messages(said) == [f"teacher {SPEC}: 2 of its 5 classes, by name"]


def test_a_file_with_spaces_a_mark_and_windows_ends_of_lines(tmp_path):
    path = tmp_path / "map.txt"
    path.write_bytes("\ufeffcat \r\n dog\r\n-".encode())
    config = RunConfig(view=VIEW, teacher=SPEC, teacher_classes=str(path))
    assert load_class_matched_teacher(config, ["dog", "cat"]).columns.tolist() == [1, 0]


def test_a_bad_file_is_refused_in_one_line(tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file(flat(3).state_dict(), weights)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00a")

    def refused(lines: list[str] | Path, text: str, spec: str = f"{SPEC}@{weights}") -> None:
        path = lines if isinstance(lines, Path) else write_lines(tmp_path / "map.txt", lines)
        config = RunConfig(view=VIEW, teacher=spec, teacher_classes=str(path))
        with pytest.raises(InputError, match=text) as error:
            load_class_matched_teacher(config, ["cat", "dog"])
        assert "\n" not in str(error.value)

    refused(tmp_path / "gone", "cannot read teacher_classes .*gone: No such file")
    refused(tmp_path, "cannot read teacher_classes .*is a folder, not a file")
    refused(tmp_path / "binary", "cannot read teacher_classes .*binary: 'utf-8' codec")
    refused(["cat", "dog", "dog"], r"map.txt has class 'dog' twice, as outputs 1 and 2: give each")
    # Numbers are names here: the file was given to be believed.
    refused(["0", "1", "2"], r"map.txt lacks 2 of the data's 2 classes, such as 'cat'")
    name = "test_resnet"
    model = timm.create_model(name, num_classes=4)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    spec = f"timm:{name}@{tmp_path}/timm.safetensors"
    refused(["cat", "dog"], rf"map.txt has 2 lines, teacher {spec} has 4 outputs: give each", spec)


# ---------------------------------------------------------------------------------------------
# ImageNet's synsets
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> str:
    """A timm teacher with 1000 outputs."""
    path = tmp_path_factory.mktemp("imagenet") / "w.safetensors"
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return f"timm:test_resnet@{path}"


def test_a_subset_of_imagenet_needs_no_file(imagenet, said):
    classes = [PHONE, TENCH, SPANIEL]
    teacher = load_class_matched_teacher(RunConfig(view=VIEW, teacher=imagenet), classes)
    synsets = ImageNetInfo().label_names()
    assert [synsets[column] for column in teacher.columns.tolist()] == classes
    assert messages(said) == [f"teacher {imagenet}: 3 of its 1000 classes, by name"]
    with pytest.raises(InputError, match=r"lacks 1 of the data's 2 classes, such as 'n99999999'"):
        load_class_matched_teacher(RunConfig(view=VIEW, teacher=imagenet), [TENCH, "n99999999"])
    with pytest.raises(InputError, match="has 1000 classes, the data set has 2, and not both"):
        load_class_matched_teacher(RunConfig(view=VIEW, teacher=imagenet), ["cat", "dog"])


def test_all_of_imagenet_and_a_thousand_other_classes_keep_their_order(imagenet, said):
    synsets = list(ImageNetInfo().label_names())
    for classes in (synsets, [*synsets[:-1], "n99999999"], [f"c{n:03d}" for n in range(1000)]):
        teacher = load_class_matched_teacher(RunConfig(view=VIEW, teacher=imagenet), classes)
        assert teacher.columns is None
    assert len(messages(said)) == 2  # for the last two
    reversed_ = load_class_matched_teacher(RunConfig(view=VIEW, teacher=imagenet), synsets[::-1])
    assert reversed_.columns.tolist() == list(range(1000))[::-1]


@pytest.mark.parametrize("count", [11221, 11821, 21841, 21842, 21843])
def test_larger_lists_of_imagenet_by_their_number_of_classes(count, monkeypatch):
    model = flat(count)
    model.pretrained_cfg = {}
    monkeypatch.setattr(teacher_module, "load_teacher", lambda spec, **_: Teacher(model, spec))
    teacher = load_class_matched_teacher(RunConfig(view=VIEW, teacher=SPEC), [SPANIEL, TENCH])
    names = next(list(ImageNetInfo(s).label_names()) for s in (
        "imagenet-21k-miil", "imagenet-12k", "imagenet-22k", "imagenet-22k-ms", "imagenet-21k-goog"
    ) if ImageNetInfo(s).num_classes() == count)  # fmt: skip
    assert teacher.columns.tolist() == [names.index(SPANIEL), names.index(TENCH)]


# ---------------------------------------------------------------------------------------------
# Sweep
# ---------------------------------------------------------------------------------------------


def test_random_lists_against_columns_in_float64(tmp_path, monkeypatch):
    """Permutations, subsets and supersets, from weights, a file or timm's list; every codec."""
    rng = np.random.default_rng(0)
    synsets = ImageNetInfo().label_names()
    monkeypatch.setattr(teacher_classes, "ImageNetInfo", lambda _: ImageNetInfoOnce)
    counts = {"refused": 0, "as they are": 0, "selected": 0}
    for trial in range(int(os.environ.get("DEIT_FAST_SWEEP", "150"))):
        source = ("weights", "file", "timm")[trial % 3]
        every = synsets if source == "timm" else [f"class {n}" for n in range(40)]
        outputs = 1000 if source == "timm" else int(rng.integers(2, 20))
        names = list(every) if source == "timm" else rng.permutation(every)[:outputs].tolist()
        take = rng.permutation(names)[: int(rng.integers(2, min(outputs, 20) + 1))].tolist()
        classes = take + (["a class of the data alone"] if rng.random() < 0.2 else [])
        if rng.random() < 0.2:
            classes = list(names)
        config = RunConfig(view=VIEW, teacher=SPEC)
        if source == "file":
            config = config.replace(teacher_classes=write_lines(tmp_path / "map.txt", names))
        network = flat(outputs)
        if source == "timm":
            network.pretrained_cfg = {}
        teacher = Teacher(network, SPEC)
        teacher.class_names = names if source == "weights" else None
        monkeypatch.setattr(teacher_module, "load_teacher", lambda *_, t=teacher, **__: t)
        if not {*classes} <= {*names}:
            with pytest.raises(InputError, match=r"lacks 1 of the data's .* 'a class of the data"):
                load_class_matched_teacher(config, classes)
            counts["refused"] += 1
            continue
        load_class_matched_teacher(config, classes)
        columns = [names.index(name) for name in classes]
        is_whole = columns == list(range(outputs))
        assert (teacher.columns is None) == is_whole
        counts["as they are" if is_whole else "selected"] += 1
        images = torch.randn(6, 3, 16, 16)
        logits = teacher(images)
        weight, bias = (p.double() for p in network[1].parameters())
        exact = (images.flatten(1).double() @ weight.T + bias)[:, columns]
        torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
        check_codecs(logits, exact, tau=float(rng.choice([1.0, 3.0])))
    print(counts)
    assert all(counts.values())


class ImageNetInfoOnce:
    """timm reads its files anew for each object."""

    label_names = ImageNetInfo().label_names


def check_codecs(logits: torch.Tensor, exact: torch.Tensor, tau: float) -> None:
    """Soft, top-k (with the default k, which may be above the count) and hard targets."""
    classes = exact.shape[1]
    target = torch.log_softmax(exact / tau, 1)
    for name in ("dense-fp32", "topk", "hard"):
        codec = codec_from_config(CodecConfig(name=name), classes, tau)
        stored = codec.decode(codec.encode(logits), tau)
        if isinstance(stored, TopK):
            assert stored.ids.shape[1] == min(16, classes)
            found = target.gather(1, stored.ids.long())
            torch.testing.assert_close(stored.log_probs.double(), found, rtol=2e-3, atol=2e-3)
        elif stored.dim() == 1:
            assert torch.equal(stored, exact.argmax(1))
        else:
            found = torch.log_softmax(stored.double() / tau, 1)
            torch.testing.assert_close(found, target, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Precompute, train, verify, analyze
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subset(tmp_path_factory) -> RunConfig:
    """Three classes, and a teacher of five whose file has them in another order."""
    root = tmp_path_factory.mktemp("subset")
    write_images(root / "data", ["ant", "bee", "cat"])
    save_file(flat(5).state_dict(), root / "teacher.safetensors")
    lines = write_lines(root / "map.txt", ["cat", "-", "ant", "-", "bee"])
    return digits_student().replace(
        epochs=1, num_views=1, batch_size=6, compile="none", output=str(root / "run"),
        teacher=f"{SPEC}@{root}/teacher.safetensors", teacher_classes=lines,
        cache=str(root / "cache"), loss={"kind": "soft", "tau": 2.0},
        model={"args": TWO_BLOCKS}, view={"repeats": 1},
        data={"root": str(root / "data"), "workers": 0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(subset) -> LogitCache:
    precompute(subset)
    return LogitCache.open(subset.cache)


def test_a_cache_of_some_of_the_classes(subset, cache, capsys):
    assert cache.manifest["codec"]["num_classes"] == 3
    assert cache.manifest["codec"]["k"] == 3
    found = cache.manifest["fingerprint"]
    assert found["teacher.num_classes"] == 5 and len(found["teacher.columns"]) == 64
    assert main(["cache", "info", subset.cache]) == 0
    assert "3 of the teacher's 5" in capsys.readouterr().out
    again = ["cache", "verify", subset.cache, "--teacher", subset.teacher,
             "--data-root", subset.data.root]  # fmt: skip
    assert main([*again, "--teacher-classes", subset.teacher_classes]) == 0
    assert ", 0 differ" in capsys.readouterr().out
    assert main(again) == 2


def test_a_run_from_the_cache_online_and_checked_learns_the_same(subset, cache, tmp_path):
    losses = {}
    for name, changes in {
        "cached": {"teacher": None, "teacher_classes": None},
        "online": {"cache": None},
        "checked": {"check_teacher_every": 1},
    }.items():
        config = subset.replace(output=str(tmp_path / name), **changes)
        losses[name] = train(config)["loss"]
    assert losses["cached"] == losses["checked"] == pytest.approx(losses["online"], rel=1e-3)
    other = write_lines(tmp_path / "other.txt", ["ant", "-", "bee", "-", "cat"])
    online = subset.replace(output=str(tmp_path / "online"), cache=None, teacher_classes=other)
    with pytest.raises(InputError, match=r"made of something else \(teacher\.model .*columns"):
        train(online)


def test_an_analysis_has_the_selected_classes(subset, tmp_path):
    config = subset.replace(output=str(tmp_path / "run"), cache=None)
    train(config)
    (found,) = analyze([Path(config.output)], teacher=config.teacher, maps=0)
    other = write_lines(tmp_path / "other.txt", ["ant", "-", "bee", "-", "cat"])
    (changed,) = analyze(
        [Path(config.output)], teacher=config.teacher, teacher_classes=other, maps=0
    )
    assert changed["teacher"] != found["teacher"]


def test_another_selection_is_another_cache(subset, cache, tmp_path):
    other = write_lines(tmp_path / "other.txt", ["ant", "-", "bee", "-", "cat"])
    changed = subset.replace(teacher_classes=other)
    for use in (precompute, train):
        with pytest.raises(CacheMismatch, match=r"differs in one field: .*teacher\.columns"):
            use(changed)


def test_a_cache_of_permuted_classes_is_not_that_of_the_teacher_as_it_stands(tmp_path):
    """The fields of both are the same but for the selection, which only one has."""
    data = write_images(tmp_path / "data", ["ant", "bee"])
    save_file(flat(2).state_dict(), tmp_path / "w.safetensors")
    plain = digits_student().replace(
        epochs=1, num_views=1, batch_size=4, compile="none", output=str(tmp_path / "run"),
        teacher=f"{SPEC}@{tmp_path}/w.safetensors", cache=str(tmp_path / "cache"),
        model={"args": TWO_BLOCKS}, view={"repeats": 1}, data={"root": str(data), "workers": 0},
    )  # fmt: skip
    lines = write_lines(tmp_path / "map.txt", ["bee", "ant"])
    precompute(plain.replace(teacher_classes=lines))
    with pytest.raises(CacheMismatch, match=r"differs in one field: .*teacher\.columns"):
        train(plain)
    with pytest.raises(CacheMismatch, match=r"differs in one field: .*teacher\.columns"):
        verify_against_teacher(str(plain.cache), str(plain.teacher), plain.data)


def test_a_cache_of_data_whose_classes_are_renumbered_is_refused(tmp_path):
    """The labels of shards get their names from classes.txt alone."""
    images = write_images(tmp_path / "images", ["0", "1"])
    for split in ("train", "val"):
        (tmp_path / "tars" / split).mkdir(parents=True)
        with tarfile.open(tmp_path / "tars" / split / "0.tar", "w") as archive:
            for path in sorted((images / split).glob("*/*.png")):
                label, key = path.parent.name, f"{path.parent.name}-{path.stem}"
                for name, content in ((f"{key}.png", path.read_bytes()), (f"{key}.cls", label)):
                    data = content.encode() if isinstance(content, str) else content
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    write_lines(tmp_path / "tars/classes.txt", ["ant", "bee"])
    config = digits_student().replace(
        epochs=1, num_views=1, batch_size=4, compile="none", output=str(tmp_path / "run"),
        teacher=SPEC, cache=str(tmp_path / "cache"), model={"args": TWO_BLOCKS},
        view={"repeats": 1},
        data={"root": str(tmp_path / "tars"), "source": "tar", "workers": 0},
    )  # fmt: skip
    precompute(config)
    write_lines(tmp_path / "tars/classes.txt", ["bee", "ant"])
    with pytest.raises(CacheMismatch, match=r"dataset\.sha256"):
        train(config.replace(teacher=None))


def test_selected_logits_under_compile(subset, monkeypatch):
    eager = functools.partialmethod(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", eager)
    plain = load_class_matched_teacher(subset, ["ant", "bee", "cat"])
    compiled = load_class_matched_teacher(subset, ["ant", "bee", "cat"])
    compiled.to_device(torch.device("cpu"), compiled=True)
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(compiled(images), plain(images))


def test_the_fingerprint_of_a_teacher_as_it_stands_is_as_before(subset):
    teacher = load_teacher(str(subset.teacher), num_classes=5)
    assert [*teacher.fingerprint()] == [
        "teacher.spec", "teacher.weights_sha256", "teacher.num_classes", "teacher.mean",
        "teacher.std",
    ]  # fmt: skip
    assert "teacher.columns" in Job(subset).planned_caches()[0].manifest["fingerprint"]
