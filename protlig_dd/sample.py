"""Sample new proteins from a trained model.

python -m protlig_dd.sample from=runs/demo output=designs.fasta n=10
python -m protlig_dd.sample from=runs/demo output=designs.fasta n=10 lengths=100-300 steps=128 seed=7
torchrun --nproc-per-node=8 -m protlig_dd.sample from=runs/demo output=designs.fasta n=10000
"""

from omegaconf import DictConfig

from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import SampleConfig
from protlig_dd.diffusion.sampling import check_sampler
from protlig_dd.inference.generate import describe_designs, options_of, sample_designs
from protlig_dd.inference.lengths import choose_lengths, longest_of
from protlig_dd.inference.model import load_trained
from protlig_dd.inference.steering import read_log_bias
from protlig_dd.system.files import check_free, write_new
from protlig_dd.system.terminal import announce


def sample_proteins(cfg: DictConfig) -> None:
    """Load a model's averaged weights, sample proteins, and write FASTA."""
    config = read_config(cfg, SampleConfig)
    output = check_free(config.output)
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    check_sampler(trained.graph, options_of(config))
    lengths = choose_lengths(config.lengths, config.n, config.seed, trained.lengths)
    if config.lengths == "empirical" and trained.lengths is not None:
        announce(f"lengths are drawn from {trained.lengths.description}", trained.processes)
    trained.check_length(longest_of(config.lengths, lengths), f"lengths={config.lengths}: the longest protein")
    if trained.context != "none":
        announce(
            f"warning: this model was trained with data.context={trained.context} ({trained.context}-case residues are "
            "given, the others are predicted), but the command `sample` writes whole proteins; use `infill` with "
            f"context={trained.context}",
            trained.processes,
        )
    samples = sample_designs(trained, config, lengths=lengths, log_bias=read_log_bias(config.log_bias, lengths))
    names = [f"{trained.run}_{i}" for i in range(1, config.n + 1)]
    note = "" if config.lengths == "empirical" else f" lengths={config.lengths}"
    text = describe_designs(trained, config, samples, names=names, notes=[note] * config.n)
    if trained.processes.first:
        write_new(output, text)
    announce(f"{output}: {len(samples)} proteins", trained.processes)


def main() -> None:
    """The command line."""
    run_verb(sample_proteins, "sample", SampleConfig)


if __name__ == "__main__":
    main()
