import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.config.train import OPTIMIZERS, SCHEDULES
from protlig_dd.model.positions import POSITIONS
from protlig_dd.training.ema import EMA, HORIZON, resolve_decay
from protlig_dd.training.optim.make import make_optimizer
from protlig_dd.training.optim.muon import orthogonalise
from protlig_dd.training.optim.schedule import learning_rate, resolve_warmup_steps

from .conftest import make_model, random_batch, train_config

OPTIM = replace(train_config().optim, betas=[0.9, 0.99])


@given(st.sampled_from(SCHEDULES), st.integers(0, 50), st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_the_schedule_warms_up_and_falls_to_its_floor(
    schedule: str, warmup: int, max_steps: int, floor: float, share: float
) -> None:
    optim = replace(OPTIM, schedule=schedule, lr=2.0, warmup_steps=warmup, min_lr_ratio=floor, decay_share=share)
    lrs = [learning_rate(step, optim, max_steps) for step in range(max_steps + 1)]
    warmup = resolve_warmup_steps(warmup, max_steps)
    assert all(0 < lr <= 2.0 for lr in lrs[:max_steps])
    assert 0 <= lrs[-1] <= 2.0
    warm, cool = lrs[:warmup], lrs[warmup:]
    assert warm == sorted(warm)
    assert cool == sorted(cool, reverse=True)
    if max_steps > warmup:
        assert lrs[warmup] == pytest.approx(2.0)
        if schedule == "cosine" or round(max_steps * (1 - share)) < max_steps:
            assert lrs[-1] == pytest.approx(2.0 * floor)
        if schedule == "wsd":
            stable = max(warmup, round(max_steps * (1 - share)))
            assert lrs[warmup : stable + 1] == [2.0] * (min(stable, max_steps) + 1 - warmup)


@given(st.integers(0, 3000), st.integers(1, 3000))
def test_every_run_reaches_its_peak_learning_rate(configured: int, max_steps: int) -> None:
    warmup = resolve_warmup_steps(configured, max_steps)
    assert warmup == (configured if configured < max_steps else max_steps // 10)
    optim = replace(OPTIM, schedule="cosine", lr=2.0, warmup_steps=configured)
    lrs = [learning_rate(step, optim, max_steps) for step in range(max_steps)]
    assert max(lrs) == pytest.approx(2.0)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)])
def test_orthogonalise_keeps_singular_vectors_and_equalises_singular_values(shape: tuple[int, int, int]) -> None:
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrices = u * torch.linspace(0.1, 1.0, s.shape[1]) @ v
    for matrix, found in zip(matrices, orthogonalise(matrices, torch.float32), strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        in_basis = u.T @ found @ v.T
        singular_values = in_basis.diagonal()
        assert 0.5 < singular_values.min() < singular_values.max() < 1.3
        assert (in_basis - singular_values.diag()).norm() < 1e-3


def test_muon_equals_torchs_muon_with_the_fused_qkv_split() -> None:
    """Compare five steps with torch.optim.Muon, which orthogonalises in bf16, one matrix at a time."""
    torch.manual_seed(0)
    model = make_model(time_conditioning=False)
    hidden = [(n, p) for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    assert len(hidden) == 8
    reference_weights = [
        torch.nn.Parameter(part.clone()) for n, p in hidden for part in p.detach().chunk(3 if "qkv" in n else 1)
    ]
    start = [part.detach().clone() for part in reference_weights]
    optimizer = make_optimizer(model, replace(OPTIM, name="muon", lr=1e-2, weight_decay=0.1), "fp32")
    reference = torch.optim.Muon(
        reference_weights, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        parts = [part for n, p in hidden for part in p.grad.chunk(3 if "qkv" in n else 1)]  # type: ignore[union-attr]
        for parameter, part in zip(reference_weights, parts, strict=True):
            parameter.grad = part.clone()
        optimizer.step()
        reference.step()
    found = [part for n, p in hidden for part in p.detach().chunk(3 if "qkv" in n else 1)]
    for a, b, before in zip(found, reference_weights, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - before).norm()


@pytest.mark.parametrize(
    "options", [{}, {"time_conditioning": False}, {"mlp": "swiglu", "norm": "rms"}, {"tie_weights": True}]
)
def test_muon_updates_attention_and_mlp_matrices_and_adamw_the_rest(options: dict[str, Any]) -> None:
    model = make_model(**options)
    optimizer = make_optimizer(model, replace(OPTIM, name="muon", lr=1e-2, weight_decay=0.1), "fp32")
    names = {parameter: name for name, parameter in model.named_parameters()}
    hidden, decayed, plain = ({names[parameter] for parameter in group["params"]} for group in optimizer.param_groups)
    layers = ("qkv", "attention_out", "mlp")
    assert hidden == {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks.") and name.split(".")[2] in layers
    }
    assert len(hidden) >= 2 * 4
    assert any(".adaln." in name for name in decayed) is options.get("time_conditioning", True)
    assert not hidden & decayed
    assert hidden | decayed | plain == set(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_muon_orthogonalises_the_inner_matrix_of_each_head_and_adamw_updates_gates_and_vectors() -> None:
    model = make_model(mixers=["ttt_linear", "ttt_mlp"], time_conditioning=False)
    optimizer = make_optimizer(model, replace(OPTIM, name="muon", lr=1e-2, weight_decay=0.1), "fp32")
    names = {parameter: name for name, parameter in model.named_parameters()}
    hidden, decayed, plain = ({names[parameter] for parameter in group["params"]} for group in optimizer.param_groups)
    matrices = {f"0.inner.{name}" for name in ("matrix.weight",)} | {f"1.inner.matrix_{i}.weight" for i in "12"}
    linear = {f"{i}.{name}.weight" for i in "01" for name in ("qkv", "gate", "ttt_out", "mlp.up", "mlp.down")}
    assert hidden == {f"blocks.{name}" for name in matrices | linear}
    assert decayed == {"head.out.weight", "blocks.0.rate.weight", "blocks.1.rate.weight"}
    vectors = ("inner.norm_gain", "inner.norm_shift", "directions.forward_alpha", "directions.backward_alpha")
    vectors += ("heads_norm.weight", "heads_norm.bias", "rate.bias")
    assert {f"blocks.{i}.{name}" for i in "01" for name in vectors} <= plain
    assert {"blocks.0.inner.bias", "blocks.1.inner.bias_1", "blocks.1.inner.bias_2"} <= plain
    matrix = model.blocks[0].inner.matrix
    before = matrix.matrices.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    # each of the 4 heads has a matrix of 8 x 8; the singular values of its update are close to 0.2 lr sqrt(8)
    updates = torch.linalg.svdvals(matrix.matrices.detach() - before) / (0.2 * 1e-2 * math.sqrt(8))
    assert updates.shape == (4, 8)
    assert 0.5 < updates.min() < updates.max() < 1.3


def test_weight_decay_acts_on_matrices_but_not_on_the_embedding() -> None:
    model = make_model()
    optimizer = make_optimizer(model, replace(OPTIM, name="adamw", lr=1e-3, weight_decay=0.1), "fp32")
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert "embedding.weight" in {names[parameter] for parameter in plain["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", POSITIONS)
def test_tables_of_positions_and_a_tied_output_are_neither_decayed_nor_orthogonalised(kind: str, name: str) -> None:
    limit = 50 if POSITIONS[kind].limited else None
    model = make_model(positions=kind, max_positions=limit, tie_weights=True)
    optimizer = make_optimizer(model, replace(OPTIM, name=name, lr=1e-3, weight_decay=0.1), "fp32")
    names = {parameter: name for name, parameter in model.named_parameters()}
    *_, plain = optimizer.param_groups
    assert plain["weight_decay"] == 0.0
    expected = {name for name in names.values() if name.startswith(("positions.", "embedding.", "head.out."))}
    assert expected <= {names[parameter] for parameter in plain["params"]}
    updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(names[parameter] for parameter in updated) == sorted(names.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("gradient", [1.0, float("nan")])
def test_found_inf_leaves_the_weights_unchanged(name: str, gradient: float) -> None:
    model = make_model()
    optimizer = make_optimizer(model, replace(OPTIM, name=name, lr=1e-1, weight_decay=0.1), "fp32")
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    for frozen in (False, True):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        model(random_batch([9]), torch.ones(1)).square().sum().backward()
        if frozen:
            for parameter in model.parameters():
                parameter.grad.mul_(gradient)  # type: ignore[union-attr]
        optimizer.found_inf.fill_(float(frozen))  # type: ignore[attr-defined]
        optimizer.step()
        same = all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        assert same is frozen


def test_ema_averages_each_parameter_and_can_be_swapped_in_and_out() -> None:
    model = make_model()
    ema = EMA(model, decay=0.75)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 60):
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        ema.update(model, step)
        decay = min(0.75, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    raw = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with ema.swapped_in(model):
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter, expected[name], atol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, raw[name])
        assert torch.allclose(ema.weights[name], expected[name], atol=1e-5)


def test_automatic_ema_decay_averages_over_a_fixed_fraction_of_the_run() -> None:
    assert 1 / (1 - resolve_decay("auto", 100_000)) == pytest.approx(HORIZON * 100_000)
    assert resolve_decay("auto", 1) == 0.0
