import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.training.ema import EMA
from protlig_dd.training.optim import learning_rate, make_optimizer

from .conftest import make_model, random_batch


@given(st.integers(0, 50), st.integers(1, 300), st.floats(0, 1))
def test_the_schedule_warms_up_and_falls_to_its_floor(warmup: int, max_steps: int, floor: float) -> None:
    lrs = [
        learning_rate(step, lr=2.0, warmup_steps=warmup, max_steps=max_steps, min_lr_ratio=floor)
        for step in range(max_steps + 1)
    ]
    assert all(0 < lr <= 2.0 for lr in lrs[:max_steps])
    assert 0 <= lrs[-1] <= 2.0
    warm, cool = lrs[:warmup], lrs[warmup:]
    assert warm == sorted(warm)
    assert cool == sorted(cool, reverse=True)
    if max_steps > warmup:
        assert lrs[warmup] == pytest.approx(2.0)
        assert lrs[-1] == pytest.approx(2.0 * floor)


def test_decay_acts_on_matrices_only() -> None:
    model = make_model()
    optimizer = make_optimizer("adamw", model, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert "embedding.weight" in {names[parameter] for parameter in plain["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    with pytest.raises(ValueError, match="optim.name=sgd"):
        make_optimizer("sgd", model, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def test_found_inf_freezes_the_fused_step() -> None:
    model = make_model()
    optimizer = make_optimizer("adamw", model, lr=1e-1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    for frozen in (False, True):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        model(random_batch([9]), torch.ones(1)).square().sum().backward()
        optimizer.found_inf.fill_(float(frozen))  # type: ignore[attr-defined]
        optimizer.step()
        same = all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        assert same is frozen


def test_ema_is_the_average_by_name_and_swaps_in_and_out() -> None:
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
