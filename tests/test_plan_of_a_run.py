"""`plan=true`: the estimated cost of a config, compared with the memory and FLOPs of its training."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from protlig_dd.batch import PackedBatch
from protlig_dd.config.components import build_model
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.model.mixers import MIXERS
from protlig_dd.model.mixers.matmul import LONGEST
from protlig_dd.model.positions import POSITIONS
from protlig_dd.training.cost import (
    LONG_RUN_FLOPS,
    activation_bytes,
    is_worth_compiling,
    kept_bytes,
    plan,
    print_plan,
    with_available_data,
)

from .conftest import Command, assert_one_line_error, train_config


def config_of(*overrides: str) -> TrainConfig:
    return replace(train_config("model=tiny", *overrides), time_conditioning=False)


def saved_bytes(model: nn.Module, lengths: list[int], precision: str) -> int:
    """Return the bytes that a forward pass with real tensors saves for the backward pass, without the float32 weights.

    The pack has sequences of these lengths.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def save(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    batch = PackedBatch.pack([torch.zeros(length, dtype=torch.int64) for length in lengths])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x), autocast:
        model.train()(batch, torch.ones(len(lengths)))
    return sum(size for pointer, size in saved.items() if pointer not in weights)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_fake_tensors_give_the_saved_bytes_of_real_tensors(precision: str, checkpointing: bool, mixer: str) -> None:
    mixers = [mixer, "attention"]
    config = config_of("model.n_blocks=2", f"model.checkpointing={checkpointing}", f"model.mixers=[{','.join(mixers)}]")
    model = build_model(config.model, "sdpa", time_conditioning=False)
    assert kept_bytes(config, precision, mixers, checkpointing, [128]) == saved_bytes(model, [128], precision)


def test_activations_of_mixed_blocks_are_the_sum_over_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protlig_dd.training.cost.TOKENS", 32)  # as many tokens as two chunks of ttt_linear
    config = config_of("model.n_blocks=3", "model.mixers=[attention,attention,ttt_linear]")
    model = build_model(config.model, "sdpa", time_conditioning=False)
    plain = activation_bytes(config, "fp32")
    assert saved_bytes(model, [200], "fp32") == pytest.approx(200 * plain, rel=0.05)
    attention, two = (
        activation_bytes(replace(config, model=replace(config.model, n_blocks=n, mixers="attention")), "fp32")
        for n in (1, 2)
    )
    checkpointed = activation_bytes(replace(config, model=replace(config.model, checkpointing=True)), "fp32")
    # A block of ttt_linear keeps more bytes than a block of attention. With checkpointing the backward pass recomputes
    # one block at a time, and the estimate includes the bytes of the block that keeps the most: ttt_linear.
    assert two - attention < plain - two < checkpointed < plain


@pytest.mark.parametrize("mixers", ["[attention,attention]", "[ttt_linear,attention]"])
@pytest.mark.parametrize("kind", [kind for kind, encoding in POSITIONS.items() if encoding.is_biased()])
def test_the_estimate_of_activations_with_a_bias_assumes_proteins_of_maximum_length(
    kind: str, mixers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack of short proteins keeps less than a pack of the longest proteins.

    The reason is that the bias and the attention weights grow with the square of the length.
    """
    monkeypatch.setattr("protlig_dd.training.cost.TOKENS", 32)
    options = [f"model.positions={kind}", f"model.mixers={mixers}", f"model.n_blocks={mixers.count(',') + 1}"]
    options += ["model.hidden_size=16", "model.n_heads=4", "model.cond_dim=8"]
    if POSITIONS[kind].limited:
        options.append("model.max_positions=242")
    estimates = []
    for max_len in (60, 240):
        config = config_of(*options, f"data.max_len={max_len}")
        estimates.append(activation_bytes(config, "fp32"))
        lengths = [max_len + 2 - i for i in range(3)]
        saved = saved_bytes(build_model(config.model, "sdpa", time_conditioning=False), lengths, "fp32")
        assert saved == pytest.approx(sum(lengths) * estimates[-1], rel=0.05)
    assert estimates[1] > 1.2 * estimates[0]


def test_the_plan_prints_which_attention_it_counts_if_there_is_a_bias(
    store: SequenceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, counted in (("rope", False), ("alibi", True)):
        config = config_of(f"model.positions={kind}", "data.max_len=60")
        print_plan(config, StoreGroup([store]), torch.device("cpu"), "fp32", 1)
        printed = " ".join(capsys.readouterr().out.split())
        assert (
            "attention's activations are those of sdpa for proteins of 60 residues; flex keeps less" in printed
        ) == counted
    config = config_of("data.max_len=60")
    for precision, device, counted in (("bf16", "cpu", True), ("bf16", "cuda", False)):
        print_plan(config, StoreGroup([store]), torch.device(device), precision, 1, peak=1e12)
        printed = " ".join(capsys.readouterr().out.split())
        assert ("attention's activations are those of matmul for proteins of 60 residues" in printed) == counted


@pytest.mark.slow
def test_the_plan_counts_the_attention_weights_that_matmul_keeps() -> None:
    estimates = {}
    for max_len in (62, 510):  # with <bos> and <eos>, multiples of 64 tokens, to which training pads packs
        config = config_of("model.n_blocks=3", f"data.max_len={max_len}")
        estimates[max_len] = activation_bytes(config, "bf16", "matmul")
        lengths = [max_len + 2 - i for i in range(3)]
        saved = saved_bytes(build_model(config.model, "matmul", time_conditioning=False), lengths, "bf16")
        weights = 2 * sum(parameter.numel() for parameter in build_model(config.model, "sdpa", False).parameters())
        assert saved - weights == pytest.approx(sum(lengths) * estimates[max_len], rel=0.05)
    assert estimates[510] > 1.1 * estimates[62]


def test_matmul_is_counted_in_packs_of_the_longest_proteins_whose_weights_it_keeps() -> None:
    kept = [
        activation_bytes(config_of("model.n_blocks=1", f"data.max_len={length}"), "bf16", "matmul")
        for length in (LONGEST - 2, LONGEST - 1, 2 * LONGEST)
    ]
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.slow
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_linear_in_tokens_and_depth(mlp: str, precision: str) -> None:
    """Compare the estimate with real tensors in a deep network. The estimate counts fake tensors in small networks."""
    config = config_of("model.n_blocks=5", f"model.mlp={mlp}")
    model = build_model(config.model, "sdpa", time_conditioning=False)
    for tokens in (250, 1000):
        expected = tokens * activation_bytes(config, precision)
        saved = saved_bytes(model, [250] * (tokens // 250), precision)
        if precision == "bf16":  # bf16 copies of the weights are saved once, not per token
            saved -= 2 * sum(part.weight.numel() for part in model.blocks.modules() if isinstance(part, nn.Linear))
        assert saved == pytest.approx(expected, rel=0.03)


def test_checkpointed_activations_of_20_blocks_take_less_than_a_sixth_of_the_bytes() -> None:
    plain, checkpointed = (
        activation_bytes(config_of("model.n_blocks=20", f"model.checkpointing={flag}"), "fp32")
        for flag in ("false", "true")
    )
    assert checkpointed < plain / 6


@pytest.mark.parametrize(
    ("optimizer", "mixers"), [("adamw", "attention"), ("muon", "attention"), ("muon", "[ttt_linear,ttt_mlp]")]
)
def test_the_plan_agrees_with_the_model_and_its_optimizer(
    store: SequenceStore, monkeypatch: pytest.MonkeyPatch, optimizer: str, mixers: str
) -> None:
    monkeypatch.setattr("protlig_dd.training.cost.TOKENS", 32)
    config = config_of(f"optim={optimizer}", "trainer.max_steps=10", "optim.packs_per_step=2", f"model.mixers={mixers}")
    found = plan(config, StoreGroup([store]), torch.device("cpu"), "fp32", 1)
    model = build_model(config.model, "sdpa", time_conditioning=False)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["step_tokens"] == 2 * config.data.tokens_per_pack
    numbers = 5 * found["parameters"]
    if optimizer == "muon":
        numbers -= sum(p.numel() for name, p in model.blocks.named_parameters() if p.ndim == 2 and "rate" not in name)
    assert found["state_bytes"] == 4 * numbers
    train = store.split("train")
    lengths = [min(int(store.lengths[row]), config.data.max_len) + 2 for row in train]
    assert found["flops_per_token"] == pytest.approx(3 * model.flops(lengths) / sum(lengths))


def test_the_plan_counts_epochs_of_cropped_sequences(store: SequenceStore) -> None:
    config = config_of("trainer.max_steps=null", "trainer.epochs=3", "data.max_len=60", "data.tokens_per_pack=500")
    tokens = sum(min(int(store.lengths[row]), 60) + 2 for row in store.split("train"))
    found = plan(config, StoreGroup([store]), torch.device("cpu"), "fp32", 1)
    assert found["steps"] == pytest.approx(3 * tokens / found["step_tokens"], rel=0.2)
    assert found["epochs"] == pytest.approx(3, rel=0.1)
    two = plan(config, StoreGroup([store]), torch.device("cpu"), "fp32", 2)
    work, work_of_two = (estimate["seconds"] * estimate["peak_flops"] for estimate in (found, two))
    assert work == pytest.approx(work_of_two)  # two processes share this CPU


def test_compiling_is_worthwhile_from_a_number_of_flops_on(store: SequenceStore) -> None:
    group, tokens = StoreGroup([store]), int(store.token_counts[0].sum())
    config = config_of("trainer.max_steps=1", "optim.packs_per_step=2", "data.tokens_per_pack=1000", "data.max_len=98")
    model = build_model(config.model, "sdpa", time_conditioning=False)
    per_step, per_epoch = (x * model.training_flops([100]) / 100 for x in (2000, tokens))
    for key, flops in (("max_steps", per_step), ("epochs", per_epoch)):
        limit = math.ceil(LONG_RUN_FLOPS / flops)
        for number in (1, limit - 1, limit, 10 * limit):
            lengths = {"max_steps": None, "epochs": None} | {key: number}
            changed = replace(config, trainer=replace(config.trainer, **lengths))
            assert is_worth_compiling(changed, group) is (number >= limit)


@pytest.mark.parametrize(("device", "share"), [("cuda", 3), ("cpu", 1)])
def test_the_planned_time_is_the_flops_divided_by_the_speed_of_all_devices(
    store: SequenceStore, device: str, share: int
) -> None:
    config = config_of("trainer.max_steps=10", "optim.packs_per_step=2")
    for processes, devices in ((1, 1), (3, share)):
        found = plan(config, StoreGroup([store]), torch.device(device), "fp32", processes, peak=1e12)
        flops = 10 * 2 * config.data.tokens_per_pack * found["flops_per_token"]
        assert found["seconds"] == pytest.approx(flops / (0.4 * 1e12 * devices))


@pytest.mark.slow
def test_ranks_of_torchrun_print_the_plan_once_and_train_nothing(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "protlig_dd.training")
    process = run_python(*torchrun, "plan=true", "model=tiny", "optim.packs_per_step=2", f"data.path={store.path}")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("GFLOP per token") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_recipe_can_be_planned_on_other_data_before_its_own_exist(run_python: Command, tmp_path: Path) -> None:
    command = ("-m", "protlig_dd.training", "experiment=uniref50_35m", "plan=true")
    process = run_python(*command)
    assert process.returncode == 0, process.stderr
    first, second, *_ = process.stdout.splitlines()
    assert first.startswith("data/uniref50.h5 does not exist: protein lengths and epochs are")
    assert second.startswith("data: the bundled sample of 7,371 proteins")
    assert "on an H100  0.19 days" in process.stdout  # as in docs/scaling.md
    assert "network     positions rope, mixers attention (auto), mlp gelu" in process.stdout
    assert "warning" not in process.stdout  # many epochs of the sample give no warning: it is not the run's data
    assert not (tmp_path / "runs").exists()
    epochs = run_python(*command, "trainer.max_steps=null", "trainer.epochs=2")
    assert_one_line_error(epochs, "data/uniref50.h5: no such")


def test_a_plan_does_not_replace_existing_data(store: SequenceStore, tmp_path: Path) -> None:
    for path in (str(store.path), "auto"):
        config = config_of(f"data.path={path}")
        assert with_available_data(config) == config
    both = config_of(f"data.path=[{store.path},{tmp_path / 'none.h5'}]", "data.weights=[1,2]")
    found = with_available_data(both).data
    assert (found.path, found.weights) == ("auto", None)


def test_the_command_prints_the_plan_and_trains_nothing(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    process = run_python("-m", "protlig_dd.training", "plan=true", "model=tiny", f"data.path={store.path}")
    assert process.returncode == 0, process.stderr
    for word in ("parameters  1.6 M", "GFLOP per token", "activations", "KiB per token", "days on 1 x cpu", "TFLOP/s"):
        assert word in process.stdout
    sequences = len(store.split("train"))
    assert re.search(rf"\nwarning: [\d,]+ epochs of only {sequences} training sequences", process.stdout)
    assert not (tmp_path / "runs").exists()


def test_a_plan_rejects_a_backend_that_cannot_compute_the_position_encoding(
    store: SequenceStore, run_python: Command
) -> None:
    keys = ("plan=true", f"data.path={store.path}", "model.positions=t5", "model.attention_backend=flash_attn")
    process = run_python("-m", "protlig_dd.training", *keys)
    assert_one_line_error(process, "model.attention_backend=flash_attn cannot add the bias of model.positions=t5")
