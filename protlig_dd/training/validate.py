"""Everything that can be wrong with a training config by itself, said before any data is read."""

from pathlib import Path

from protlig_dd.data.loader import check_pack_sizes
from protlig_dd.data.store import SPLITS
from protlig_dd.diffusion.sampling import PREDICTORS
from protlig_dd.diffusion.score import check_parametrisation
from protlig_dd.model.dit import check_dimensions
from protlig_dd.runtime.config import TrainConfig, build_graph, build_noise


def check_train_config(config: TrainConfig) -> None:
    """Raise a ValueError, before any data is read, for values that cannot work together."""
    model, optim, trainer = config.model, config.optim, config.trainer
    check_dimensions(model.hidden_size, model.n_heads, model.n_blocks, model.cond_dim, model.dropout)
    check_pack_sizes(config.data.max_len, config.data.tokens_per_pack)
    check_parametrisation(build_graph(config.graph), config.parametrisation, config.time_conditioning)
    build_noise(config.noise)
    if (trainer.max_steps is None) == (trainer.epochs is None):
        raise ValueError(f"give one of trainer.max_steps={trainer.max_steps} and trainer.epochs={trainer.epochs}")
    for key, value, least in (
        ("seed", config.seed, 0),
        ("data.workers", config.data.workers, 0),
        ("optim.packs_per_step", optim.packs_per_step, 1),
        ("optim.warmup_steps", optim.warmup_steps, 0),
        ("trainer.max_steps", trainer.max_steps, 1),
        ("trainer.epochs", trainer.epochs, 0),
        ("trainer.stop_at_step", trainer.stop_at_step, 1),
        ("trainer.log_every", trainer.log_every, 1),
        ("trainer.eval_every", trainer.eval_every, 0),
        ("trainer.eval_draws", trainer.eval_draws, 1),
        ("trainer.eval_max_sequences", trainer.eval_max_sequences, 2),
        ("trainer.checkpoint_every", trainer.checkpoint_every, 1),
        ("trainer.keep_last", trainer.keep_last, 1),
        ("report.max_sequences", config.report.max_sequences, 2),
        ("report.draws", config.report.draws, 1),
        ("report.samples", config.report.samples, 0),
        ("report.steps", config.report.steps, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")
    for key, number in (("optim.lr", optim.lr), ("optim.grad_clip", optim.grad_clip), ("optim.eps", optim.eps)):
        if not number > 0:
            raise ValueError(f"{key} must be above 0, got {number}")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ValueError(f"optim.betas must be two numbers in [0, 1), got {list(optim.betas)}")
    if not 0 <= optim.ema_decay < 1:
        raise ValueError(f"optim.ema_decay must lie in [0, 1), got {optim.ema_decay}")
    if config.run.resume not in ("auto", "never"):
        raise ValueError(f"run.resume={config.run.resume}; there are auto, never")
    if config.report.split not in SPLITS:
        raise ValueError(f"report.split={config.report.split}; there are {', '.join(SPLITS)}")
    if config.report.predictor not in PREDICTORS:
        raise ValueError(f"report.predictor={config.report.predictor}; there are {', '.join(PREDICTORS)}")
    if config.run.name != Path(config.run.name).name or config.run.name in ("", ".", ".."):
        raise ValueError(f"run.name={config.run.name!r} must be a plain folder name")
