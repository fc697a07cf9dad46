"""Convert FASTA files to a store that training reads, list the members of clusters, or describe and verify a file.

python -m protlig_dd.prepare input=my.fasta output=data/my.h5
python -m protlig_dd.prepare input=[a.fasta,b.fasta.gz] output=data/my.h5 split.test_fraction=0.05
python -m protlig_dd.prepare 'input={train: a.fasta, validation: b.fasta, test: c.fasta}' output=data/my.h5
zcat *.fasta.gz | python -m protlig_dd.prepare input=- output=data/my.h5
python -m protlig_dd.prepare inspect=data/my.h5
python -m protlig_dd.prepare members.clusters=data/uniref50.h5 members.store=data/uniref90.h5 \\
    members.table=members.tsv.gz output=data/uniref50-90.members.h5
"""

from pathlib import Path

from omegaconf import DictConfig

from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import PrepareConfig
from protlig_dd.data.members import Members, is_members_file
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.prepare.describe import describe, describe_members, inspect, inspect_members
from protlig_dd.data.prepare.filters import Filters
from protlig_dd.data.prepare.members import build_members
from protlig_dd.data.prepare.splits import Split
from protlig_dd.data.store import SequenceStore
from protlig_dd.system.terminal import ByteBar, console
from protlig_dd.system.workers import count_workers

FEW = 10  # warn if a held-out split has fewer sequences: a mean over so few has a large standard error


def prepare(cfg: DictConfig) -> None:
    """Read the inputs, filter and split them, write the store, and print its contents."""
    config = read_config(cfg, PrepareConfig)
    if any(value is not None for value in vars(config.members).values()):
        prepare_members(config)
        return
    if (config.inspect is None) == (config.input is None):
        raise ValueError("give either input=... (to write a store) or inspect=... (to describe a store)")
    if config.inspect is not None:
        if config.output is not None:
            raise ValueError(f"inspect={config.inspect} writes nothing: leave out output={config.output}")
        if is_members_file(config.inspect):
            inspect_members(Members(config.inspect))
        else:
            inspect(SequenceStore(config.inspect))
        return
    if config.output is None:
        raise ValueError("give the store to write: output=data/my.h5")
    inputs: dict[str, str] | list[str]
    if isinstance(config.input, dict):
        inputs = {str(split): str(file) for split, file in config.input.items()}
        split = Split(check=config.split.check, on_hit=config.split.on_hit)
    else:
        inputs = [str(file) for file in (config.input if isinstance(config.input, list) else [config.input])]
        split = Split(**vars(config.split))
    options = vars(config.filter) | {"taxa_nodes": Path(nodes) if (nodes := config.filter.taxa_nodes) else None}
    store = build_store(
        inputs,
        Path(config.output),
        filters=Filters(**options),
        split=split,
        workers=count_workers(config.workers),
        progress=ByteBar,
    )
    describe(store)
    if config.filter.taxa is not None and nodes is None:
        console.print(
            "filter.taxa kept only the listed TaxIDs; filter.taxa_nodes=nodes.dmp also keeps the taxa below them"
        )
    for name, counts in store.manifest["splits"].items():
        if name != "train" and counts["sequences"] < FEW:
            remedy = (
                f"name a {name} file" + (" with more sequences" if counts["sequences"] else "")
                if isinstance(config.input, dict)
                else f"prepare again with a larger split.{name}_fraction"
            )
            found = f"has only {counts['sequences']} sequences" if counts["sequences"] else "is empty"
            console.print(f"warning: the {name} split {found}, but training evaluates on it: {remedy}")


def prepare_members(config: PrepareConfig) -> None:
    """Write a file of members, and print its contents."""
    for key, value in {**vars(config.members), "output": config.output}.items():
        if value is None:
            name = key if key == "output" else f"members.{key}"
            raise ValueError(f"{name}=null: give members.clusters, members.store, members.table and output")
    for key in ("input", "inspect"):
        if (value := getattr(config, key)) is not None:
            raise ValueError(f"{key}={value} and members.table={config.members.table}: give only one of them")
    clusters, store = SequenceStore(str(config.members.clusters)), SequenceStore(str(config.members.store))
    table, output = str(config.members.table), str(config.output)
    describe_members(build_members(clusters, store, table, output, progress=ByteBar))


def main() -> None:
    """The command line."""
    run_verb(prepare, "prepare", PrepareConfig, rank0_only=True)


if __name__ == "__main__":
    main()
