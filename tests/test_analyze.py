"""`analyze`: its figures against hand-built models, slow formulas and counting."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from deit_fast.cli import main
from deit_fast.config import RunConfig
from deit_fast.config_file import to_dict
from deit_fast.data.eval import eval_pixels, spaced_ids
from deit_fast.data.image_folder import ImageFolder
from deit_fast.errors import InputError
from deit_fast.evaluation import evaluate, read_run_config
from deit_fast.models import create_student, forward_heads, fuse, load_teacher, unfuse
from deit_fast.models.convnet import small_convnet
from deit_fast.models.student import build_model
from deit_fast.recipes import digits_student
from deit_fast.runtime.environment import describe_command
from deit_fast.runtime.locks import owned_folder
from deit_fast.tools.analysis import measures, tokens
from deit_fast.tools.analysis.measures import soften_sample
from deit_fast.tools.analysis.one_run import student_values, undistilled
from deit_fast.tools.analysis.runs import analyze
from deit_fast.tools.analysis.table import summarise
from deit_fast.tools.report.page import build_report
from helpers.digits import write_few_digits
from helpers.runs import TWO_BLOCKS

CONVNET = "deit_fast.models.convnet:small_convnet"


def fixed_teacher(num_classes: int) -> torch.nn.Module:
    """A factory that gives the same weights each time, so that its name finds them."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return small_convnet(num_classes, width=4)


# ---------------------------------------------------------------------------------------- measures


def test_calibration_equals_the_formula_computed_slowly() -> None:
    edges = torch.tensor([0.0, 1.0, 0.2, 0.4, 0.6, 0.8, 0.8], dtype=torch.float64)
    confidence = torch.cat([torch.rand(500, dtype=torch.float64), edges])
    right = torch.rand(507) < confidence
    found = measures.calibration(confidence, right)
    error, bins = 0.0, []
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = [
            i for i, c in enumerate(confidence.tolist()) if low < c <= high or c == number == 0
        ]
        if not inside:
            continue
        accuracy = sum(bool(right[i]) for i in inside) / len(inside)
        mean = sum(confidence[i].item() for i in inside) / len(inside)
        error += len(inside) / 507 * abs(accuracy - mean)
        bins.append((len(inside), pytest.approx(mean), pytest.approx(accuracy)))
    assert found["ece"] == pytest.approx(error, rel=1e-12)
    assert [(b["count"], b["confidence"], b["accuracy"]) for b in found["bins"]] == bins
    # one of two confident decisions is wrong
    assert measures.calibration(torch.tensor([0.9, 0.9]), torch.tensor([True, False]))[
        "ece"
    ] == pytest.approx(0.4)


def test_disagreement_is_counted() -> None:
    names = ("truth", "teacher", "both")
    decisions = {name: torch.randint(0, 3, (50,)) for name in names}
    found = measures.disagreement(decisions)
    assert found["names"] == list(names)
    for i, one in enumerate(names):
        for j, two in enumerate(names):
            count = sum(
                a != b
                for a, b in zip(decisions[one].tolist(), decisions[two].tolist(), strict=True)
            )
            assert found["shares"][i][j] == count / 50


def test_softening_equals_its_definition() -> None:
    logits = 4 * torch.randn(6, 12)
    entropy, mass = measures.softening(logits)
    assert measures.kept_classes(12) == (1, 5, 10) and measures.kept_classes(5) == (1,)
    for row, values in enumerate(logits.tolist()):
        for index, temperature in enumerate(measures.TEMPERATURES):
            weights = sorted((math.exp(v / temperature) for v in values), reverse=True)
            probs = [w / sum(weights) for w in weights]
            expected = -sum(p * math.log(p) for p in probs)
            assert entropy[row, index].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
            for i, k in enumerate((1, 5, 10)):
                assert mass[row, index, i].item() == pytest.approx(sum(probs[:k]), rel=1e-5)
    table = measures.temperature_table(entropy, mass, 12)
    assert [row["temperature"] for row in table] == list(range(1, 11))
    assert table[2]["entropy"] == pytest.approx(entropy[:, 2].mean().item(), rel=1e-6)
    assert table[2]["mass"]["5"] == pytest.approx(mass[:, 2, 1].mean().item(), rel=1e-6)
    assert measures.softening(torch.zeros(1, 12))[0][0, 0].item() == pytest.approx(math.log(12))


def test_a_high_temperature_makes_the_probabilities_of_a_sample_uniform() -> None:
    rows = soften_sample(torch.tensor([0.0, 6.0, 2.0]), ["a", "b", "c"])
    for row in rows:
        parts = [math.exp(v / row["temperature"]) for v in (6.0, 2.0, 0.0)]
        assert [item["name"] for item in row["classes"]] == ["b", "c", "a"]
        assert [item["probability"] for item in row["classes"]] == pytest.approx(
            [p / sum(parts) for p in parts]
        )


def test_the_means_of_logits_and_of_softmaxes_can_decide_differently() -> None:
    one, two = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[-30.0, 1.0, 0.9]])
    found = student_values(one, two)
    decisions = {k.split(".")[1]: v.item() for k, v in found.items() if k.startswith("decision")}
    assert decisions == {"class": 0, "distillation": 1, "mean_logits": 1, "mean_softmax": 0}
    p = one.softmax(1)[0].tolist(), two.softmax(1)[0].tolist()
    assert found["confidence.mean_softmax"].item() == pytest.approx((p[0][0] + p[1][0]) / 2)
    cosine = sum(a * b for a, b in zip(*p, strict=True)) / math.prod(math.hypot(*q) for q in p)
    assert found["probability_cosine"].item() == pytest.approx(cosine)


def test_image_ids_are_evenly_spaced_over_the_classes() -> None:
    assert spaced_ids(10, 4).tolist() == [0, 2, 5, 7]
    assert spaced_ids(3, 9).tolist() == spaced_ids(3, None).tolist() == [0, 1, 2]


# ------------------------------------------------------------------------------------------ tokens


def tiny(name: str = "deit_tiny_distilled_patch16_224", **changes: Any) -> Any:
    shape = {"patch_size": 4, "embed_dim": 4, "depth": 3, "num_heads": 2} | changes
    model = create_student(name, 3, 0.0, 8, **shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_cosines_of_a_model_whose_tokens_are_known() -> None:
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:  # pass everything through
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_(), layer.bias.zero_()
        model.blocks[1].mlp.fc2.bias.copy_(torch.tensor([0.0, 0.0, 3.0, 0.0]))
        model.pos_embed.zero_()
        model.pos_embed[0, 1] = torch.tensor([0.0, 1.0, 0.0, 0.0])
        model.cls_token.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        model.dist_token.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        model.norm.weight.fill_(1), model.norm.bias.zero_()
    with tokens.recorded_cosines(model) as cosines, torch.no_grad():
        forward_heads(model, torch.randn(2, 3, 8, 8))
        found = torch.stack(cosines, 1)
        cosines.clear()
        forward_heads(model, torch.randn(5, 3, 8, 8))
        assert torch.stack(cosines, 1).shape == (5, 5)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    def normed(a: np.ndarray) -> np.ndarray:
        return (a - a.mean()) / a.std()

    early = 1 / math.sqrt(5)  # (1, 0, 0, 0) and (1, 2, 0, 0)
    one, two = np.array([1.0, 0, 3, 0]), np.array([1.0, 2, 3, 0])
    late = 10 / math.sqrt(10 * 14)
    expected = [early, early, late, late, cosine(normed(one), normed(two))]
    assert tokens.layer_names(model) == ["input", "block 1", "block 2", "block 3", "final norm"]
    assert found.tolist() == [pytest.approx(expected, rel=1e-4)] * 2
    assert tokens.learned_cosine(model) == pytest.approx(1 / math.sqrt(2))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_cosine_of_the_heads_weights() -> None:
    heads = SimpleNamespace(
        head=SimpleNamespace(weight=torch.tensor([[1.0, 0.0], [3.0, 4.0]])),
        head_dist=SimpleNamespace(weight=torch.tensor([[0.0, 2.0], [4.0, 3.0]])),
    )
    assert tokens.head_cosines(heads).tolist() == pytest.approx([0, 24 / 25])


@pytest.mark.parametrize("form", ["plain", "fused", "attention kernel", "no distillation"])
def test_attention_is_the_softmax_of_queries_and_keys(form: str) -> None:
    name = "deit_tiny_distilled_patch16_224".replace(
        "distilled_", "" if form == "no distillation" else "distilled_"
    )
    model = tiny(name)
    if form == "plain":
        unfuse(model)
    if form == "attention kernel":
        fuse(model, kernels=("attention",))
    images = torch.randn(2, 3, 8, 8)
    found = tokens.attention_weights(model, images)
    assert len(found) == 3
    unfuse(model)
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for block, weights in zip(model.blocks, found, strict=True):
            normed, qkv = block.norm1(x), block.attn.qkv
            for head in range(2):
                q_rows = slice(2 * head, 2 * head + 2)
                k_rows = slice(4 + 2 * head, 4 + 2 * head + 2)
                q = normed @ qkv.weight[q_rows].T + qkv.bias[q_rows]
                k = normed @ qkv.weight[k_rows].T + qkv.bias[k_rows]
                scores = torch.einsum("bqd,bkd->bqk", q, k) / math.sqrt(2)
                probs = scores.exp() / scores.exp().sum(-1, keepdim=True)
                torch.testing.assert_close(weights[:, head], probs, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
            x = block(x)


def test_attention_normalises_queries_and_keys_where_the_model_does() -> None:
    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3, qk_norm=True
    ).eval()
    images = torch.randn(1, 3, 8, 8)
    (weights,) = tokens.attention_weights(model, images)
    block = model.blocks[0]
    with torch.no_grad():
        x = block.norm1(model._pos_embed(model.patch_embed(images)))
        _, _, v = block.attn.qkv(x).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = weights @ v  # the output of the attention, from the recomputed weights
        recomputed = block.attn.proj(out.transpose(1, 2).flatten(2))
        torch.testing.assert_close(recomputed, block.attn(x), rtol=1e-4, atol=1e-5)


def test_rollout_of_two_blocks_by_hand() -> None:
    one = torch.tensor([[[[0.5, 0.5], [0.0, 1.0]], [[1.0, 0.0], [0.5, 0.5]]]])  # two heads
    two = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]])
    # means (.75 .25; .25 .75) and (0 1; 1 0); with the residual (.875 .125; ...) and (.5 .5; ...)
    found = tokens.rollout([one, two])
    assert found.tolist() == [[[0.5, 0.5], [0.5, 0.5]]]
    found = tokens.rollout([two, one])  # the later block comes from the left
    assert found.sum(-1).tolist() == [[1.0, 1.0]]
    skewed = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])  # (1 0; .5 .5)
    uniform = torch.full((1, 1, 2, 2), 0.5)  # (.75 .25; .25 .75)
    assert tokens.rollout([skewed, uniform]).tolist() == [[[0.875, 0.125], [0.625, 0.375]]]
    assert tokens.rollout([uniform, skewed]).tolist() == [[[0.75, 0.25], [0.5, 0.5]]]


def test_token_maps_are_the_attention_of_each_token_to_the_patches() -> None:
    model = tiny()
    rows = torch.arange(36.0).view(1, 6, 6)  # class, distillation, four patches
    assert tokens.token_maps(model, rows).tolist() == [[[[2, 3], [4, 5]], [[8, 9], [10, 11]]]]
    plain = tiny("deit_tiny_patch16_224")
    rows = torch.arange(25.0).view(1, 5, 5)
    assert tokens.token_maps(plain, rows).tolist() == [[[[1, 2], [3, 4]]]]


def test_a_strip_shows_the_pixels_and_the_brightest_patch(tmp_path: Path) -> None:
    pixels = torch.rand(3, 8, 8)
    maps = torch.tensor([[[0.1, 0.2], [0.4, 0.0]]])
    name = tokens.draw_strip(
        tmp_path, 5, (pixels - 0.5) / 0.25, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), maps
    )
    strip = np.asarray(Image.open(tmp_path / name))
    assert name == "attention-5.png" and strip.shape == (160, 2 * 160 + tokens.GAP, 4)
    middles = strip[10::20, 10:160:20, :3]  # of each of 8 x 8 pixels
    assert np.array_equal(middles, (pixels * 255).round().byte().permute(1, 2, 0).numpy())
    tile = strip[:, 160 + tokens.GAP :, :3].astype(int)
    corners = tile[40, 40], tile[40, 120], tile[120, 40], tile[120, 120]
    assert corners[2].tolist() == [253, 231, 36]  # viridis' end
    assert corners[3].tolist() == [68, 1, 84]  # and its start
    assert strip[0, 160 + tokens.GAP // 2, 3] == 0  # nothing between the tiles


# ---------------------------------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty held-out digits, a teacher, and three runs with random weights."""
    root = tmp_path_factory.mktemp("world")
    write_few_digits(root / "data", train=1, val=6)
    torch.manual_seed(3)
    save_file(fixed_teacher(10).state_dict(), root / "fixed.safetensors")
    teacher = small_convnet(10)
    with torch.no_grad():
        teacher[-1].weight.mul_(20)  # so that its decisions depend on the image
        teacher[-1].bias -= teacher.eval()(held_out(root)[0]).mean(0)
    save_file(teacher.state_dict(), root / "teacher.safetensors")
    for name, kind in (("none", "none"), ("hard", "hard"), ("soft", "soft")):
        make_run(root, name, kind)
    return root


def make_run(world: Path, name: str, kind: str, **changes: Any) -> Path:
    config = digits_student().replace(
        output=str(world / name),
        data={"root": str(world / "data"), "workers": 0},
        loss={"kind": kind},
        model={"args": TWO_BLOCKS},
    )
    if kind == "none":
        config = config.replace(model={"name": "deit_tiny_patch16_224"})
    config = config.replace(**changes)
    (world / name).mkdir()
    torch.manual_seed(sum(name.encode()))
    model = build_model(config, 10)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    heads = [m for n, m in model.named_modules() if n in ("head", "head_dist", "23")]
    with torch.no_grad():
        logits = [z for z in forward_heads(model.eval(), held_out(world)[0]) if z is not None]
        for head, z in zip(heads, logits, strict=True):
            head.bias -= z.mean(0)  # so that the decision depends on the image
    save_file(model.state_dict(), world / name / "model.safetensors")
    (world / name / "config.json").write_text(json.dumps(to_dict(config)))
    return world / name


@pytest.fixture(scope="module")
def found(world: Path) -> dict[str, dict[str, Any]]:
    """The analyses as the verb left them, by run."""
    names = ("none", "hard", "soft")
    spec = f"{CONVNET}@{world}/teacher.safetensors"
    runs = [str(world / name) for name in names]
    assert main(["analyze", *runs, "--teacher", spec, "--output", str(world / "out.json")]) == 0
    return {n: json.loads((world / n / "analysis/analysis.json").read_text()) for n in names}


def held_out(world: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as the digits' views are normalised, and labels, made one by one."""
    source = ImageFolder(str(world / "data"), "val")
    pixels = [eval_pixels(source.load(i), 16, 0.875) for i in range(source.num_samples)]
    images = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return (images - 0.5) / 0.5, torch.tensor(source.labels)


def decide(world: Path, name: str) -> dict[str, torch.Tensor]:
    """Decisions of a run's heads, with timm's own forward in double precision."""
    from safetensors.torch import load_file

    config = read_run_config(world / name)
    model: Any = unfuse(build_model(config, 10)).eval().double()
    model.load_state_dict(load_file(world / name / "model.safetensors"))
    with torch.no_grad():
        features = model.forward_features(held_out(world)[0].double())
        logits = [model.head(features[:, 0])]
        if name != "none":
            logits.append(model.head_dist(features[:, 1]))
    if len(logits) == 1:
        return {"student": logits[0].argmax(1)}
    return {
        "class": logits[0].argmax(1),
        "distillation": logits[1].argmax(1),
        "both": (logits[0] + logits[1]).argmax(1),
        "softmax": (logits[0].softmax(1) + logits[1].softmax(1)).argmax(1),
    }


def test_accuracy_is_what_evaluate_measures(world: Path, found: dict[str, dict]) -> None:
    for name in ("none", "hard", "soft"):
        measured = evaluate(str(world / name))
        accuracy = found[name]["accuracy"]
        assert accuracy[found[name]["main"]] == pytest.approx(measured["top1"], abs=1e-6)
        assert found[name]["images"] == measured["samples"] == 60
        if name != "none":
            assert accuracy["class"] == pytest.approx(measured["top1_class"], abs=1e-6)
            assert accuracy["distillation"] == pytest.approx(measured["top1_distill"], abs=1e-6)
    softmax = decide(world, "soft")["softmax"] == held_out(world)[1]
    expected = softmax.float().mean().item()
    assert found["soft"]["accuracy"]["mean_softmax"] == pytest.approx(expected, abs=1e-6)


def test_disagreement_counts_every_pair(world: Path, found: dict[str, dict]) -> None:
    images, labels = held_out(world)
    spec = f"{CONVNET}@{world}/teacher.safetensors"
    teacher = load_teacher(spec, num_classes=10, input_mean=(0.5,) * 3, input_std=(0.5,) * 3)
    decisions = {"truth": labels, "teacher": teacher(images).argmax(1)}
    decisions |= {"undistilled": decide(world, "none")["student"], **decide(world, "hard")}
    table = found["hard"]["disagreement"]
    assert table["names"] == [
        "truth", "teacher", "undistilled", "class", "distillation", "both",
    ]  # fmt: skip
    for name, row in zip(table["names"], table["shares"], strict=True):
        for other, share in zip(table["names"], row, strict=True):
            assert share == (decisions[name] != decisions[other]).sum().item() / 60, (name, other)
    # Otherwise a constant decision would pass.
    assert all(len(decision.unique()) > 2 for decision in decisions.values())
    assert found["none"]["disagreement"]["names"] == ["truth", "teacher", "student"]
    assert found["hard"]["undistilled"]["run"] == str(world / "none")
    agreement = (decisions["class"] == decisions["distillation"]).float().mean().item()
    assert found["hard"]["heads"]["agreement"] == pytest.approx(agreement)


def test_teacher_temperatures_come_from_its_own_logits(world: Path, found: dict[str, dict]) -> None:
    images, labels = held_out(world)
    spec = f"{CONVNET}@{world}/teacher.safetensors"
    teacher = load_teacher(spec, num_classes=10, input_mean=(0.5,) * 3, input_std=(0.5,) * 3)
    logits = teacher(images).double()
    measured = found["soft"]["teacher"]
    assert measured["spec"] == CONVNET
    assert measured["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    entropies = []
    for row in measured["temperatures"]:
        probs = (logits / row["temperature"]).softmax(1)
        entropy = torch.distributions.Categorical(probs).entropy()
        entropies.append(entropy)
        assert row["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
        assert row["mass"]["5"] == pytest.approx(probs.topk(5).values.sum(1).mean().item())
        assert set(row["mass"]) == {"1", "5"}
    least_certain = entropies[0].argmax().item()
    assert measured["sample"]["id"] == least_certain
    assert found["soft"]["attention"]["samples"][0]["id"] == least_certain
    assert measured["sample"]["label"] == str(labels[least_certain].item())
    third = measured["sample"]["temperatures"][2]["classes"]
    best = (logits[least_certain] / 3).softmax(0).topk(5)
    assert [item["name"] for item in third] == [str(i) for i in best.indices.tolist()]
    assert [item["probability"] for item in third] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_token_cosines_are_measured_over_all_images(world: Path, found: dict[str, dict]) -> None:
    model = build_model(read_run_config(world / "hard"), 10).eval()
    from safetensors.torch import load_file

    model.load_state_dict(load_file(world / "hard/model.safetensors"))
    outputs = []
    with torch.no_grad():
        plain: Any = unfuse(model)
        x = plain._pos_embed(plain.patch_embed(held_out(world)[0]))
        for layer in (torch.nn.Identity(), *plain.blocks):
            x = layer(x)
            outputs.append(F.cosine_similarity(x[:, 0], x[:, 1]))
        outputs.append(F.cosine_similarity(plain.norm(x)[:, 0], plain.norm(x)[:, 1]))
    layers = found["hard"]["tokens"]["layers"]
    for layer, values in zip(layers, outputs, strict=True):
        assert layer["mean"] == pytest.approx(values.mean().item(), abs=1e-5)
        assert layer["std"] == pytest.approx(values.std(correction=0).item(), abs=1e-5)
    # The tokens of the input do not depend on the image.
    assert layers[0]["std"] == pytest.approx(0, abs=1e-6)


def test_missing_parts_are_reported_with_a_reason(
    world: Path, found: dict[str, dict], caplog
) -> None:
    assert "tokens" not in found["none"] and "heads" not in found["none"]
    assert found["none"]["left_out"]["tokens"] == "the student has no distillation token"
    assert "attention" in found["none"]
    run = make_run(world, "convnet", "none", model={
        "name": CONVNET, "args": (),
    })  # fmt: skip
    alone = make_run(world, "alone", "hard")
    convnet, hard = analyze([run]), analyze([alone], maps=1)
    assert "not fused" not in caplog.text, "its own hooks"
    assert convnet[0]["left_out"]["attention"] == "the student is not a timm VisionTransformer"
    assert "trained without a teacher" in convnet[0]["left_out"]["teacher"]
    assert hard[0]["left_out"]["undistilled"].startswith("no run with loss.kind none")
    assert hard[0]["left_out"]["teacher"].startswith("neither the run nor its cache names")
    assert hard[0]["disagreement"]["names"] == ["truth", "class", "distillation", "both"]


def test_the_teacher_comes_from_the_run_or_from_its_cache_if_the_weights_match(
    world: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(world, "cached", "hard")
    factory = "test_analyze:fixed_teacher"
    fixed = load_teacher(factory, num_classes=10, input_mean=(0.5,) * 3, input_std=(0.5,) * 3)
    named = fixed.fingerprint() | {"from": "cache"}
    (run / "result.json").write_text(json.dumps({"teacher": named}))
    (code,) = analyze([run], maps=0)
    assert f"names the model '{factory}', and a file may not" in code["left_out"]["teacher"]
    monkeypatch.setattr("deit_fast.models.student._OWN_FACTORIES", (factory, CONVNET))
    (by_name,) = analyze([run], maps=0)
    logits = fixed(held_out(world)[0])
    expected = (logits.argmax(1) == held_out(world)[1]).float().mean().item()
    assert by_name["teacher"]["top1"] == pytest.approx(expected)

    other = {**named, "teacher.spec": CONVNET}
    (run / "result.json").write_text(json.dumps({"teacher": other}))
    (lost,) = analyze([run], maps=0)
    assert "teacher" not in lost
    assert lost["left_out"]["teacher"].endswith(f"name it by --teacher {CONVNET}@FILE")

    caplog.set_level(logging.WARNING, "deit_fast")
    analyze([run], teacher=f"{factory}@{world}/fixed.safetensors", maps=0)
    assert "not the teacher" not in caplog.text
    analyze([run], teacher=f"{CONVNET}@{world}/teacher.safetensors", maps=0)
    assert "is not the teacher that the run was trained with" in caplog.text

    online = make_run(world, "online", "soft", teacher=f"{factory}@{world}/fixed.safetensors")
    (direct,) = analyze([online], maps=0)
    assert direct["teacher"]["top1"] == pytest.approx(expected)
    (online / "result.json").write_text(json.dumps({"teacher": {"teacher.weights_sha256": "0"}}))
    (replaced,) = analyze([online], maps=0)
    assert "have changed since the training" in replaced["left_out"]["teacher"]
    gone = make_run(world, "gone", "soft", teacher=f"{factory}@{world}/gone.safetensors")
    (without,) = analyze([gone], maps=0)
    assert "gone.safetensors does not exist" in without["left_out"]["teacher"]
    hub = make_run(world, "hub", "soft", teacher="timm:resnet18")
    (offline,) = analyze([hub], maps=0)
    assert offline["left_out"]["teacher"].startswith("teacher timm:resnet18 names no weights file")


def test_another_teacher_gets_nothing_of_the_runs_teacher(world: Path, tmp_path: Path) -> None:
    """Neither its normalisation nor the names of its outputs; flags give a teacher its own."""
    lines = tmp_path / "reversed.txt"
    lines.write_text("\n".join(map(str, range(9, -1, -1))))
    mine = f"test_analyze:fixed_teacher@{world}/fixed.safetensors"
    other = f"{CONVNET}@{world}/teacher.safetensors"
    mean, std = (0.4, 0.5, 0.6), (0.4, 0.5, 0.6)
    run = make_run(
        world, "of another", "soft", teacher=mine, teacher_mean=mean, teacher_std=std,
        teacher_classes=str(lines),
    )  # fmt: skip

    def measured(spec: str, **flags: Any) -> list[float]:
        """Accuracy and entropy, which tell orders of outputs and normalisations apart."""
        (found,) = analyze([run], teacher=spec, maps=0, **flags)
        return [found["teacher"]["top1"], found["teacher"]["temperatures"][0]["entropy"]]

    def expected(spec: str, reverse: bool = False, **statistics: Any) -> Any:
        half = {"input_mean": (0.5,) * 3, "input_std": (0.5,) * 3}
        images, labels = held_out(world)
        logits = load_teacher(spec, num_classes=10, **half, **statistics)(images)
        logits = logits.flip(1) if reverse else logits
        right = (logits.argmax(1) == labels).float().mean().item()
        rows = logits.double().log_softmax(1)
        return pytest.approx([right, -(rows.exp() * rows).sum(1).mean().item()], rel=1e-4)

    views = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    given = {"mean": mean, "std": std}
    values = [expected(other, **views), expected(other, **given), expected(other, True, **given)]
    assert all(one.expected != two for one, two in itertools.permutations(values, 2))
    assert measured(other) == values[0]
    assert measured(other, teacher_mean=mean, teacher_std=std) == values[1]
    flags = {"teacher_classes": str(lines), "teacher_mean": mean, "teacher_std": std}
    assert measured(other, **flags) == values[2]
    assert measured(mine) == expected(mine, True, **given), "the run's own keeps what it had"


def test_the_runs_teacher_in_another_place_is_known_by_its_weights(world: Path, caplog) -> None:
    factory, mean, std = "test_analyze:fixed_teacher", (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)
    spec, moved = f"{factory}@{world}/fixed.safetensors", world / "moved.safetensors"
    moved.write_bytes((world / "fixed.safetensors").read_bytes())
    known = load_teacher(spec, num_classes=10, mean=mean, std=std).fingerprint()
    run = make_run(world, "moved", "soft", cache="gone")
    (run / "result.json").write_text(json.dumps({"teacher": known}))
    caplog.set_level(logging.WARNING, "deit_fast")
    analyze([run], teacher=f"{factory}@{moved}", maps=0)
    (said,) = [line for line in caplog.messages if "the run's teacher" in line]
    assert said.endswith(
        "has the weights of the run's teacher, but is used otherwise: give --teacher-mean and "
        "--teacher-std as then"
    )
    caplog.clear()
    analyze([run], teacher=f"{factory}@{moved}", teacher_mean=mean, teacher_std=std, maps=0)
    assert "the run's teacher" not in caplog.text


def test_a_teacher_that_the_cache_names_has_the_normalisation_that_it_records(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory, mean, std = "test_analyze:fixed_teacher", (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)
    monkeypatch.setattr("deit_fast.models.student._OWN_FACTORIES", (factory, CONVNET))
    half = {"input_mean": (0.5,) * 3, "input_std": (0.5,) * 3}
    teacher = load_teacher(factory, num_classes=10, mean=mean, std=std, **half)
    run = make_run(world, "recorded", "soft")
    known = teacher.fingerprint()
    (run / "result.json").write_text(json.dumps({"teacher": known}))
    (found,) = analyze([run], maps=0)
    logits = teacher(held_out(world)[0]).double().softmax(1)
    confidence = logits.gather(1, logits.argmax(1)[:, None]).mean().item()
    bins = found["teacher"]["calibration"]["bins"]
    mean_confidence = sum(b["count"] * (b["confidence"] or 0) for b in bins) / 60
    assert mean_confidence == pytest.approx(confidence, rel=1e-4)
    (run / "result.json").write_text(json.dumps({"teacher": known | {"teacher.columns": "0"}}))
    (selected,) = analyze([run], maps=0)
    assert "is used otherwise: give --teacher-classes as then" in selected["left_out"]["teacher"]


def test_the_undistilled_run_has_the_same_model_and_seed_if_possible() -> None:
    def one(name: str, kind: str, seed: int, data: str = "d") -> Any:
        config = RunConfig(seed=seed).replace(model={"name": name}, loss={"kind": kind})
        return SimpleNamespace(config=config, data_digest=data, ids=np.arange(3))

    mine = one("deit_tiny_distilled_patch16_224", "hard", 4)
    same, seed, model, data = (
        one("deit_tiny_patch16_224", "none", 4),
        one("deit_tiny_patch16_224", "none", 5),
        one("x:convnet", "none", 4),
        one("deit_tiny_patch16_224", "none", 4, "other"),
    )
    assert undistilled(mine, [data, model, seed, same, mine]) is same
    assert undistilled(mine, [data, model, seed, mine]) is seed
    assert undistilled(mine, [data, mine]) is None
    assert undistilled(same, [seed, same]) is None


def test_max_images_and_sample_select_images(world: Path, found: dict[str, dict]) -> None:
    spec = f"{CONVNET}@{world}/teacher.safetensors"
    run = make_run(world, "part", "soft")
    (part,) = analyze([run], teacher=spec, max_images=7, sample=33, maps=2)
    ids = [60 * i // 7 for i in range(7)]
    right = decide(world, "part")["both"][ids] == held_out(world)[1][ids]
    assert part["images"] == 7 and part["held_out"] == 60
    assert part["accuracy"]["mean_logits"] == pytest.approx(right.float().mean().item())
    assert part["teacher"]["sample"]["id"] == 33
    assert [row["id"] for row in part["attention"]["samples"]] == [33, 0]
    assert {p.name for p in (run / "analysis").glob("*.png")} == {
        "attention-33.png", "attention-0.png",
    }  # fmt: skip


def test_ema_analyses_the_averaged_weights(world: Path) -> None:
    run = make_run(world, "averaged", "hard")
    (run / "ema.safetensors").write_bytes((world / "soft/model.safetensors").read_bytes())
    (averaged,) = analyze([run], weights="ema", maps=0)
    assert averaged["weights"] == "ema"
    assert averaged["accuracy"]["class"] == pytest.approx(
        evaluate(str(world / "soft"))["top1_class"], abs=1e-6
    )


def test_a_second_analysis_writes_the_same_files(world: Path, found: dict[str, dict]) -> None:
    folder = world / "hard/analysis"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pictures = {row["picture"] for row in found["hard"]["attention"]["samples"]}
    assert set(before) == {"analysis.json", "predictions.json", *pictures} and len(pictures) == 4
    runs = [world / name for name in ("none", "hard")]
    analyze(runs, teacher=f"{CONVNET}@{world}/teacher.safetensors")
    for path in (*folder.glob("*.png"), folder / "predictions.json"):
        assert path.read_bytes() == before[path.name]
    again = json.loads((folder / "analysis.json").read_text())
    assert again | {"meta": None} == found["hard"] | {"meta": None}


def test_a_second_analysis_at_the_same_time_is_refused(
    world: Path, found: dict[str, dict]
) -> None:  # fmt: skip
    with (
        owned_folder(world / "hard/analysis", ".lock-analysis", "the analysis"),
        pytest.raises(InputError, match=r"\.lock-analysis: the analysis is being written by pid"),
    ):
        analyze([world / "none", world / "hard"])
    assert not list(world.glob("*/analysis/.lock*"))


def test_observations_are_counted(world: Path, found: dict[str, dict]) -> None:
    saved = json.loads((world / "out.json").read_text())
    assert saved["meta"]["torch"] and saved["meta"]["command"] == describe_command()
    assert [row["run"] for row in saved["rows"]] == [
        str(world / name) for name in ("none", "hard", "soft")
    ]
    claims = saved["observations"]
    assert len(claims) == 3 and all(item["of"] == 2 for item in claims)
    teacher = {n: found[n]["disagreement"]["shares"][1] for n in ("hard", "soft")}
    closer = {str(world / n): row[3] - row[4] for n, row in teacher.items()}
    assert claims[1]["differences"] == pytest.approx(closer)
    assert claims[1]["holds"] == sum(value > 0 for value in closer.values())
    more = {
        str(world / n): found[n]["accuracy"]["mean_logits"] - found["none"]["accuracy"]["class"]
        for n in ("hard", "soft")
    }
    assert claims[0]["differences"] == pytest.approx(more)
    layers = found["soft"]["tokens"]["layers"]
    later = claims[2]["differences"][str(world / "soft")]
    assert later == pytest.approx(layers[-2]["mean"] - layers[0]["mean"])
    assert summarise([found["none"]])["observations"] == []


def test_terminal_table_and_report_show_the_figures(
    world: Path, found: dict[str, dict], capsys: pytest.CaptureFixture
) -> None:
    runs = [str(world / name) for name in ("none", "hard")]
    assert main(["analyze", *runs, "--maps", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{100 * found['hard']['accuracy']['distillation']:.2f} %" in out
    last = found["hard"]["tokens"]["layers"][-2]
    assert f"{last['mean']:.3f} \u00b1 {last['std']:.3f}" in out
    assert "none: left out: tokens, heads: the student has no distillation token" in out
    assert "\x1b" not in out  # no terminal here
    for name in ("none", "hard"):
        (world / name / "metrics.jsonl").write_text("")
        if not (world / name / "result.json").exists():
            (world / name / "result.json").write_text("{}")
    page = build_report([world / "none", world / "hard"], "t")
    assert f"{100 * found['hard']['accuracy']['mean_softmax']:.2f} %" in page
    assert page.count("data:image/png") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run folder nowhere does not exist"),
        (["none", "--sample", "60"], "--sample 60: held-out images of "),
        (["none", "--weights", "ema"], "none/ema.safetensors does not exist; the run has"),
        (
            ["none", "--max-images", "0"],
            "--max-images must be a whole number in [1, 2147483647], or none, not 0",
        ),
        (["none", "--maps", "-1"], "--maps must be a whole number in [0, 2147483647], not -1"),
        (["hard", "--teacher", "timm:nope", "--download"], "unknown teacher 'timm:nope'"),
        (
            ["hard", "--teacher", "timm:resnet18"],
            "teacher timm:resnet18 names no weights file, so timm would download one: give "
            "--teacher timm:resnet18@FILE, or --download",
        ),
        (["none", "--data-root", "nowhere"], "data_root: folder nowhere does not exist"),
        (["none", "nowhere"], "run folder nowhere does not exist"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, world: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(world)
    assert main(["analyze", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"deit-fast: error: {message}") and line.count("\n") == 1, line


def test_damaged_files_and_logits_that_are_not_finite_are_errors(
    world: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(world, "broken", "hard")
    (run / "result.json").write_text("[")
    assert main(["analyze", str(run)]) == 2
    assert "result.json is damaged" in capsys.readouterr().err
    (run / "result.json").unlink()
    from safetensors.torch import load_file

    state = load_file(run / "model.safetensors")
    state["head.bias"][3] = math.nan
    save_file(state, run / "model.safetensors")
    for verb in ("evaluate", "analyze"):
        assert main([verb, str(run)]) == 2
        assert "the student's logits are not finite" in capsys.readouterr().err
    assert not (run / "analysis").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["analyze", str(world / "hard")]) == 2
    assert "start it without torchrun" in capsys.readouterr().err
