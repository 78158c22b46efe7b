"""Files of RayGen, FKD and TinyViT: what they hold, and that nothing in them is trusted."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from deit_fast.cache import LogitCache
from deit_fast.cache.foreign import archives, open_foreign
from deit_fast.cli import main
from deit_fast.errors import CacheError
from helpers.foreign import (
    fkd_arrays,
    npz_file,
    raygen_sample,
    tensors_file,
    tinyvit_rows,
    write_fkd,
    write_raygen,
    write_tinyvit,
)


def run(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def info(capsys: pytest.CaptureFixture, path: Path) -> dict[str, str]:
    """The rows of `cache info`; those of one name are joined."""
    status, out, err = run(capsys, "cache", "info", path)
    assert status == 0, err
    rows: dict[str, str] = {}
    for name, text in (line.split("  ", 1) for line in out.splitlines()):
        rows[name] = f"{rows[name]}\n{text.strip()}" if name in rows else text.strip()
    return rows


def export(capsys: pytest.CaptureFixture, path: Path, suffix: str) -> Any:
    """What `cache export` wrote, read by others' code: (tensors or table, keys)."""
    out = path.parent / f"out.{suffix}"
    status, _, err = run(capsys, "cache", "export", path, "--output", out)
    assert status == 0, err
    if suffix == "parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(out)
        return table, table["key"].to_pylist()
    if suffix == "pt":
        values = torch.load(out, weights_only=True)
        return values, values["key"]
    with safe_open(out, "pt") as file:
        return load_file(out), json.loads(file.metadata()["deit_fast.key"])


# ------------------------------------------------------------------------------- what is there


@pytest.mark.parametrize("as_text", [False, True])
def test_raygen_shards_are_described(tmp_path, capsys, as_text):
    samples = [raygen_sample(f"{i:08x}", i, views=3, texts=1 + i, as_text=as_text)
               for i in range(5)]  # fmt: skip
    bare = {"0f.json": b"{}", "0f.jpg": b"its image could not be read"}
    write_raygen(tmp_path / "r", [samples[:2], [*samples[2:], bare]])
    rows = info(capsys, tmp_path / "r")
    assert rows["format"] == "RayGen (DataCompDR)" and rows["files"].startswith("2, ")
    assert rows["samples"] == "5" and rows["views"] == "3 a sample"
    assert rows["image_emb"] == "float32 [3, 8]" and rows["text_emb"] == "float32 [1, 8]"
    assert rows["syn_text_emb"] == "float32 [1 to 5, 8]"
    assert rows["operations"] == "random_resized_crop, rand_augment"
    assert rows["RandAugment"] == "ShearX 10, Equalize 10"
    assert rows["left out"] == "1 samples without embeddings" and "damaged" not in rows
    assert "cannot make the same pixels; no run can use it" in rows["no replay"]


def test_raygen_exports_every_value_and_its_parameters(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    samples = [raygen_sample(f"a/{i}", i, texts=1 + i) for i in range(4)]
    write_raygen(tmp_path / "r", [samples], config=False)
    table, keys = export(capsys, tmp_path / "r", "parquet")
    assert keys == [f"a/{i}" for i in range(4)]
    for index, sample in enumerate(samples):
        stored = np.load(io.BytesIO(sample[f"a/{index}.npz"]))
        for name in ("image_emb", "text_emb", "syn_text_emb"):
            assert table[name].to_pylist()[index] == stored[name].tolist()
        parameters = json.loads(sample[f"a/{index}.paug.json"])["param_aug"]
        assert json.loads(table["param_aug"].to_pylist()[index]) == parameters
    out = tmp_path / "x.safetensors"
    status, _, err = run(capsys, "cache", "export", tmp_path / "r", "--output", out)
    assert status == 2 and "a/1 has 2 of syn_text_emb, samples before it 1" in err
    assert "export to .parquet" in err and not out.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "parquet"])
def test_bfloat16_embeddings_keep_their_bits(tmp_path, capsys, suffix):
    samples = [raygen_sample(f"{i}", i, bf16=True) for i in range(3)]
    write_raygen(tmp_path / "r", [samples[:1], samples[1:]])
    assert info(capsys, tmp_path / "r")["image_emb"] == "bfloat16 [2, 8]"
    found, keys = export(capsys, tmp_path / "r", suffix)
    assert keys == ["0", "1", "2"]
    raw = [gzip.decompress(sample[f"{i}.pth.gz"]) for i, sample in enumerate(samples)]
    stored = [torch.load(io.BytesIO(content), weights_only=True)["image_emb"] for content in raw]
    if suffix == "parquet":
        assert found["image_emb"].to_pylist() == torch.stack(stored).tolist()
    else:
        assert torch.equal(found["image_emb"], torch.stack(stored))
        assert found["image_emb"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["top", "hard", "smoothing"])
@pytest.mark.parametrize("half", [False, True])
def test_fkd_labels_are_read_as_their_writer_means_them(tmp_path, capsys, kind, half):
    written = []
    for index in range(3):
        arrays = fkd_arrays(5, 4, kind, index)
        if half:
            arrays = [arrays[0].astype(np.float16), arrays[1], arrays[2].astype(np.float16)]
        write_fkd(tmp_path / "f", f"imagenet/train/n{index}/im.a", 5, 4, arrays)
        written.append(arrays)
    rows = info(capsys, tmp_path / "f")
    assert rows["format"] == "FKD" and rows["samples"] == "3" and rows["views"] == "4 a sample"
    assert ("rounded" in rows) is half and "PIL" in rows["no replay"]
    tensors, keys = export(capsys, tmp_path / "f", "safetensors")
    assert keys == [f"imagenet/train/n{i}/im.a" for i in range(3)]
    labels = torch.stack([torch.from_numpy(arrays[2]) for arrays in written])
    assert torch.equal(tensors["coords"], torch.from_numpy(np.stack([a[0] for a in written])))
    assert torch.equal(tensors["flip"], torch.from_numpy(np.stack([a[1] for a in written])))
    if kind == "hard":
        assert torch.equal(tensors["label"], labels.int())
        return
    labels = labels if kind == "top" else labels[..., None]
    assert torch.equal(tensors["ids"], labels[:, :, 0].int())
    assert torch.equal(tensors["probs"], labels[:, :, 1])


def test_one_archive_can_be_looked_at(tmp_path, capsys):
    """Also of one view, whose arrays have both of numpy's orders; names as numpy 1 wrote them."""
    path = write_fkd(tmp_path, "im", 5, 1)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(b"numpy._core", b"numpy.core"))
    assert info(capsys, path)["ids"] == "int32 [1, 5]"
    write_raygen(tmp_path / "r", [[raygen_sample("a", 0)], [raygen_sample("b", 1)]])
    assert info(capsys, tmp_path / "r/00000001.tar")["samples"] == "1"


def test_tinyvits_records_keep_key_epoch_and_seed(tmp_path, capsys):
    names = [f"n{i:02d}/{i}.JPEG" for i in range(30)]
    epochs = [tinyvit_rows(names, 5, 40000, epoch) for epoch in (0, 1)]
    for epoch, rows in enumerate(epochs):
        items = list(rows.items())
        halves = [dict(items[1::2]), dict(items[::2])]
        halves[1][items[1][0]] = items[0][1]  # a padded key: the first rank's record counts
        write_tinyvit(tmp_path / "t", 5, epoch, halves)
    rows = info(capsys, tmp_path / "t")
    assert rows["samples"] == "60" and rows["epochs"] == "2" and rows["ids"] == "int32 [1, 5]"
    assert rows["repeated"].startswith("2 keys") and "TinyViT's own" in rows["no replay"]
    tensors, keys = export(capsys, tmp_path / "t", "safetensors")
    assert tensors["epoch"][:, 0].tolist() == [0] * 30 + [1] * 30
    assert tensors["ids"].max() > 32767 and (tensors["seed"] == 7).all()
    for index, key in enumerate(keys):
        ids, probs = epochs[index // 30][key]
        assert tensors["ids"][index, 0].tolist() == ids.tolist()
        assert tensors["probs"][index, 0].tolist() == probs.astype(np.float16).tolist()
    folder = tmp_path / "t/logits_top5_epoch1"
    assert info(capsys, folder)["samples"] == "30"


# ------------------------------------------------------------------------------ what is refused


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def saved(value: object) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def archive_of(pickled: bytes, deflated: int = 0) -> bytes:
    """An archive as torch.save writes, with a pickle of one's own."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/version", "3\n")
        if deflated:
            archive.writestr("a/data/0", bytes(deflated))
    return content.getvalue()


def one_array(array: np.ndarray, header: dict[str, Any] | None = None) -> bytes:
    """An .npz file with image_emb, whose header may lie."""
    member, content = io.BytesIO(), io.BytesIO()
    if header is None:
        np.save(member, array, allow_pickle=True)
    else:
        np.lib.format.write_array_header_1_0(member, header)
        member.write(array.tobytes())
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("image_emb.npy", member.getvalue())
    return content.getvalue()


FLOATS = np.ones((2, 8), np.float32)
HUGE = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 8)}
BOMB = archives.LIMIT + 1
STRETCHED = torch.zeros(1, dtype=torch.bfloat16).expand(1 << 20, 1 << 20)
BYTES_10_11 = b"\x80\x02cbuiltins\nbytearray\nq\x00\x8a\x05\x00\xe8\x76\x48\x17\x85R."
CALLS = b"\x80\x02]" + b"ccollections\nOrderedDict\n)R0" * 65 + b"."

RAYGEN = {
    "pickled objects": ({"npz": one_array(np.array([Trap()], object))}, "pickled objects"),
    "a shape without data": ({"npz": one_array(FLOATS, HUGE)}, "not those of its shape"),
    "whole numbers": ({"npz": npz_file({"image_emb": np.ones((2, 8), int)})}, "is int64"),
    "three dimensions": ({"npz": npz_file({"image_emb": np.ones((2, 8, 1))})}, "not [V, D]"),
    "a zip bomb": ({"npz": npz_file({"image_emb": np.zeros((2, BOMB), np.float16)})},
                   "when unpacked, more than"),
    "no zip": ({"npz": b"PK nothing"}, "no zip archive"),
    "an array that is none": ({"npz": archive_of(b"")}, "is no array"),
    "NaN": ({"npz": npz_file({**dict.fromkeys(("text_emb", "syn_text_emb"), FLOATS),
                              "image_emb": FLOATS * np.nan})}, "16 values that are not finite"),
    "a name less": ({"npz": npz_file({"image_emb": FLOATS})}, "the first sample has image_emb"),
    "other numbers": ({"npz": npz_file({"image_emb": np.ones((3, 8), np.float32)})},
                      "image_emb 3, param_aug 2"),
    "both kinds": ({"pth.gz": tensors_file({"image_emb": FLOATS})}, "it has npz and pth.gz"),
    "a gzip bomb": ({"npz": None, "pth.gz": gzip.compress(bytes(BOMB))}, "bytes when unpacked"),
    "half a gzip": ({"npz": None, "pth.gz": tensors_file({"image_emb": FLOATS})[:-9]},
                    "incomplete"),
    "no gzip": ({"npz": None, "pth.gz": b"nothing"}, "no gzip file"),
    "a trap": ({"npz": None, "pth.gz": gzip.compress(saved({"image_emb": Trap()}))},
               "an object of posix mkdir, which is not read"),
    "a bytearray of 100 GB": ({"npz": None, "pth.gz": gzip.compress(archive_of(BYTES_10_11))},
                              "an object of builtins bytearray"),
    "many calls": ({"npz": None, "pth.gz": gzip.compress(archive_of(CALLS))}, "more objects"),
    "a tensor without data": ({"npz": None, "pth.gz": gzip.compress(saved({"e": STRETCHED}))},
                              "no plain tensor"),
    "a list": ({"npz": None, "pth.gz": gzip.compress(saved([]))}, "a list, not a dictionary"),
    "no JSON": ({"paug.json": b"{"}, "paug.json is damaged"),
    "no JSON within": ({"paug.json": b'{"param_aug": "[["}'}, "paug.json is damaged"),
    "no list": ({"paug.json": b'{"param_aug": [1, 2]}'}, "no list of lists param_aug"),
    "an operation too few": ({"paug.json": b'{"param_aug": [[1], [2]]}'}, "config.json 2"),
    "operation 14": ({"paug.json": b'{"param_aug": [[0, [[14, 0]]], [0, [[1, 0]]]]}'},
                     "no operation 14"),
}  # fmt: skip


@pytest.fixture
def nothing_ran(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "trapped").exists()


def judge(capsys: pytest.CaptureFixture, path: Path, samples: int, message: str) -> None:
    """`info` counts the samples that are right and names the damage; `export` leaves nothing."""
    rows = info(capsys, path)
    assert rows["samples"] == str(samples) and message in rows["damaged"], rows
    out = path.parent / "out.safetensors"
    status, _, err = run(capsys, "cache", "export", path, "--output", out)
    assert status == 2 and message in err and err.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("fault", RAYGEN)
def test_a_damaged_member_of_raygen_is_named(tmp_path, capsys, nothing_ran, fault):
    fields, message = RAYGEN[fault]
    wrong = {**raygen_sample("wrong", 1), **{f"wrong.{n}": c for n, c in fields.items()}}
    wrong = {name: content for name, content in sorted(wrong.items()) if content is not None}
    write_raygen(tmp_path / "r", [[raygen_sample("a", 0), wrong, raygen_sample("z", 2)]])
    judge(capsys, tmp_path / "r", 2, message)
    assert "00000000.tar: wrong" in info(capsys, tmp_path / "r")["damaged"]


@pytest.mark.parametrize("cut", [700, 3000, 5120])
def test_a_truncated_shard_is_damage_and_the_next_one_is_read(tmp_path, capsys, cut):
    samples = [raygen_sample(f"{i}", i) for i in range(3)]
    write_raygen(tmp_path / "r", [[samples[0]], samples[1:]])
    shard = tmp_path / "r/00000000.tar"
    shard.write_bytes(shard.read_bytes()[:cut])
    rows = info(capsys, tmp_path / "r")
    assert rows["samples"] == "2"
    assert "is not a complete, plain tar archive" in rows["damaged"]
    assert rows["damaged"].count("00000000.tar") == 1


def test_a_key_twice_and_links_are_damage(tmp_path, capsys):
    sample = raygen_sample("a", 0)
    write_raygen(tmp_path / "r", [[sample, raygen_sample("b", 1), sample]])
    judge(capsys, tmp_path / "r", 2, "a: the key is there twice")


COORDS, FLIP, LABEL = fkd_arrays(5, 4)


def changed(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.reshape(-1)[0] = value
    return array


FKD = {
    "a trap": ([COORDS, FLIP, Trap()], "an object of posix mkdir, which is not read"),
    "objects": ([COORDS, FLIP, np.array([Trap()] * 4, object)], "posix mkdir"),
    "other dtypes": ([COORDS, FLIP, LABEL.astype(np.complex64)], "dtype c8, which is not read"),
    "tensors": ([torch.zeros(4, 4), FLIP, LABEL], "an object of torch"),
    "two arrays": ([COORDS, FLIP], "2 arrays, not coords, flip and label"),
    "other lengths": ([COORDS[:3], FLIP, LABEL], "not those of the same views"),
    "no views": ([COORDS[:0], FLIP[:0], LABEL[:0]], ""),
    "coords outside": ([changed(COORDS, 1.5), FLIP, LABEL], "not in [0, 1]"),
    "coords NaN": ([changed(COORDS, np.nan), FLIP, LABEL], "not in [0, 1]"),
    "flips of numbers": ([COORDS, FLIP.astype(int), LABEL], "not true or false"),
    "broken ids": ([COORDS, FLIP, changed(LABEL, 0.5)], "no whole numbers from 0 on"),
    "negative ids": ([COORDS, FLIP, changed(LABEL, -1)], "no whole numbers from 0 on"),
    "ids twice": ([COORDS, FLIP, changed(LABEL, LABEL[0, 0, 1])], "view 0 has no different ids"),
    "probabilities": ([COORDS, FLIP, LABEL * [[[1], [9]]]], "with probabilities"),
    "another shape": ([COORDS, FLIP, LABEL[:, :, :, None]], "a label of shape (4, 2, 5, 1)"),
    "another K": (fkd_arrays(6, 4), "the first sample has"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FKD)
def test_a_damaged_file_of_fkd_is_named(tmp_path, capsys, nothing_ran, fault):
    arrays, message = FKD[fault]
    write_fkd(tmp_path / "f", "n/a", 5, 4)
    write_fkd(tmp_path / "f", "n/wrong", 5, 4, arrays)
    judge(capsys, tmp_path / "f", 1, message)
    assert "n/wrong.tar" in info(capsys, tmp_path / "f")["damaged"]


@pytest.mark.parametrize("fault", ["truncated", "bomb", "flipped bit", "no torch", "large"])
def test_damaged_bytes_of_fkd_are_named(tmp_path, capsys, nothing_ran, fault):
    write_fkd(tmp_path / "f", "n/a", 5, 4)
    path = write_fkd(tmp_path / "f", "n/wrong", 5, 4)
    content = path.read_bytes()
    new, message = {
        "truncated": (content[:900], "no zip archive, or a damaged one"),
        "bomb": (archive_of(b"\x80\x02].", BOMB), "when unpacked, more than"),
        "flipped bit": (content[:400] + bytes([content[400] ^ 1]) + content[401:], "damaged"),
        "no torch": (npz_file({"a": FLOATS}), "torch.save did not write it"),
        "large": (bytes(BOMB), f"has more than {archives.LIMIT} bytes"),
    }[fault]
    path.write_bytes(new)
    judge(capsys, tmp_path / "f", 1, message)


@pytest.mark.parametrize("fault", ["K", "truncated", "not text", "probabilities"])
def test_wrong_tinyvit_files_are_named(tmp_path, capsys, fault):
    rows = tinyvit_rows([f"k{i}" for i in range(8)], 4, 100, 0)
    if fault == "probabilities":
        rows["k3"] = (rows["k3"][0], np.full(4, 0.9))
    folder, kept = tmp_path / "t/logits_top4_epoch0", 0
    write_tinyvit(tmp_path / "t", 4, 0, [rows])
    values = folder / "rank0-values.bin"
    if fault == "K":
        folder.rename(tmp_path / "t/logits_top6_epoch0")
        message = "8 keys of top-6 need 224"
    elif fault == "truncated":
        values.write_bytes(values.read_bytes()[:-3])
        message = "rank0-values.bin: it has 157 bytes; 8 keys of top-4 need 160"
    elif fault == "not text":
        (folder / "rank0-keys.txt").write_bytes(b"\xff\xfe" * 9)
        message = "rank0-keys.txt is not text"
    else:
        message, kept = "k3 has no 4 different ids with probabilities", 7
    judge(capsys, tmp_path / "t", kept, message)


@pytest.mark.parametrize("name", ["raygen", "fkd", "tinyvit"])
def test_changed_bytes_raise_nothing(tmp_path, three, name):
    """Each of 80 damaged copies gives records or damage; anything else fails this test."""
    found = open_foreign(three / name)
    assert found is not None
    content, draw = found.files[0].read_bytes(), np.random.default_rng(0)
    path = tmp_path / found.files[0].relative_to(three / name)
    shutil.copytree(three / name, tmp_path, dirs_exist_ok=True)
    outcomes = Counter[str]()
    for _ in range(80):
        damaged = bytearray(content)
        for index in draw.integers(0, len(content), draw.integers(1, 5)):
            damaged[index] = draw.integers(0, 256)
        path.write_bytes(damaged)
        reader = type(found)(tmp_path, [path] if name != "tinyvit" else [path.parent])
        outcomes.update(type(item).__name__ for item in reader.records())
    assert set(outcomes) == {"Damage", "Records"}, outcomes


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    write_raygen(folder / "raygen", [[raygen_sample("a", 0)]])
    write_fkd(folder / "fkd", "n/a", 5, 4)
    write_tinyvit(folder / "tinyvit", 3, 0, [tinyvit_rows(["a", "b"], 3, 10, 0)])
    return folder


@pytest.mark.parametrize("name", ["raygen", "fkd", "tinyvit"])
def test_no_run_reads_them_and_the_reason_is_said(three, capsys, name):
    path, found = three / name, open_foreign(three / name)
    assert found is not None
    with pytest.raises(CacheError, match=r"which no run can use: its .* this loader cannot"):
        LogitCache.open(path)
    status, _, err = run(capsys, "cache", "verify", path)
    assert status == 2 and found.replay in err and err.count("\n") == 1
    for words in (["info", path, "--html", three / "x.html"],
                  ["export", path, "--views", "0:1", "--output", three / "x.pt"]):  # fmt: skip
        status, _, err = run(capsys, "cache", *words)
        assert status == 2 and f"{path} holds files of {found.name}" in err


def test_other_folders_and_archives_are_no_format(tmp_path, capsys):
    assert open_foreign(tmp_path) is None and open_foreign(tmp_path / "gone") is None
    write_raygen(tmp_path / "images", [[{"a.jpg": b"1", "a.cls": b"2"}]])
    (tmp_path / "deep/1/2/3/4/5").mkdir(parents=True)
    (tmp_path / "deep/1/2/3/4/5/a.tar").write_bytes(b"")
    for path in (tmp_path / "images", tmp_path / "images/00000000.tar", tmp_path / "deep", "\0"):
        assert open_foreign(path) is None
    status, _, err = run(capsys, "cache", "info", tmp_path / "images")
    assert status == 2 and "is not a cache: it has no manifest.json" in err


def test_an_export_without_samples_leaves_nothing(tmp_path, capsys):
    write_raygen(tmp_path / "r", [[{"a.json": b"{}", "a.paug.json": b"{}"}]])
    for suffix in ("parquet", "safetensors", "pt"):
        out = tmp_path / f"x.{suffix}"
        status, _, err = run(capsys, "cache", "export", tmp_path / "r", "--output", out)
        assert status == 2 and "has no sample to export" in err and not out.exists()


def test_traps_work_where_they_are_not_refused(tmp_path, monkeypatch):
    """Otherwise the tests above would show nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "trapped").is_dir()
