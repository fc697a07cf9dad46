"""Train a model.

python -m protlig_dd.training experiment=demo
python -m protlig_dd.training experiment=demo trainer.max_steps=50 optim.lr=1e-3
python -m protlig_dd.training -m optim.lr=3e-4,1e-3
python -m protlig_dd.training data.path=my.h5 model=tiny run.name=mine
python -m protlig_dd.training from=runs/demo data.path=family.h5 run.name=family trainer.max_steps=200 optim.lr=1e-3
python -m protlig_dd.training --config-name config_uniref50_stable trainer.devices=4
torchrun --nproc-per-node=4 -m protlig_dd.training --config-name config_uniref50_stable
"""

from protlig_dd.config.cli import run_verb
from protlig_dd.config.train import TrainConfig
from protlig_dd.training.build import run


def main() -> None:
    """Run the command line."""
    run_verb(run, "train", TrainConfig)


if __name__ == "__main__":
    main()
