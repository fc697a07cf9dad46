import pytest
import torch

from protlig_dd.training.loop import metrics_rows


def test_rates_are_averages_over_all_steps_since_the_last_flush() -> None:
    step = {"pack_loss": torch.tensor([1.0, 2.0]), "grad_norm": torch.tensor(0.5), "lr": 0.1, "waited": 0.25}
    steps = [
        step | {"step": 7, "residues": 100, "residues_seen": 1100, "flops": 3_000},
        step | {"step": 8, "residues": 300, "residues_seen": 1400, "flops": 5_000},
    ]
    rows = metrics_rows(steps, seconds=2.0, memory=2**29, peak_flops=10_000.0)
    assert [row["step"] for row in rows] == [7, 8]
    for row in rows:
        assert row["residues_per_s"] == 200
        assert row["mfu"] == pytest.approx(0.4)
        assert (row["loss"], row["peak_memory_gib"], row["data_wait_s"]) == (3.0, 0.5, 0.25)
