"""Convert ESM-2, DPLM or a model with their architecture to an exported model, which every command accepts.

python -m protlig_dd.convert from=facebook/esm2_t12_35M_UR50D to=models/esm2_35m
python -m protlig_dd.convert from=downloads/dplm_150m to=models/dplm_150m
"""

from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import config_folder, read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.config.verbs import ConvertConfig
from protlig_dd.inference.download import download
from protlig_dd.inference.esm import FILES, PICKLES, EsmSource, network_of, read_esm, translate
from protlig_dd.inference.exported import CARD, is_exported, write_exported
from protlig_dd.inference.model import SavedModel, describe, find_saved, load_saved
from protlig_dd.system.files import check_free, creating
from protlig_dd.system.terminal import console


def convert(cfg: DictConfig) -> None:
    """Write an exported model with the weights of a model in the format of transformers' EsmForMaskedLM."""
    config = read_config(cfg, ConvertConfig)
    for key, value in (("from", config.from_), ("to", config.to)):
        if not value:
            raise ValueError(f"{key} is empty; give a folder or, as from=, a name on the hub")
    to, folder = check_free(config.to), Path(config.from_)
    if is_exported(folder) and (folder / "vocabulary.json").is_file():
        raise ValueError(
            f"{folder} is a model of protlig_dd already: export writes one from a run; copy an exported one"
        )
    downloaded = not folder.is_dir()
    if downloaded:
        folder = download(config.from_, config.revision, FILES)
        if not any(folder.glob("model*.safetensors")):
            folder = download(config.from_, config.revision, (*FILES, *PICKLES))
    elif config.revision is not None:
        raise ValueError(f"revision={config.revision} is for a name on the hub, but from={folder} is a local folder")
    source = read_esm(folder)
    weights = translate(source)
    name = "_".join(Path(config.from_).resolve().name.split()) if not downloaded else config.from_.rpartition("/")[2]
    saved = SavedModel(
        path=folder,
        weights=folder,
        config=training_config(name, source),
        step=0,
        length_counts=None,
        cropped_sequences=None,
        data_fingerprint="",
        skipped=[],
        converted_from={
            "name": config.from_ if downloaded else name,
            "revision": config.revision,
            "commit": folder.name if downloaded else None,
            "sha256": source.sha256,
        },
    )
    with creating(to) as temporary:
        write_exported(temporary, weights, describe(saved, None))
        load_saved(find_saved(str(temporary)), torch.device("cpu"), "fp32")  # check that the new folder loads
    parameters, model = sum(tensor.numel() for tensor in weights.values()), saved.config.model
    console.print(
        f"{to}: {config.from_}, {parameters / 1e6:.1f} M parameters in {model.n_blocks} blocks of width "
        f"{model.hidden_size}, for proteins of up to {source.max_len} residues"
    )
    console.print(f"the licence of {config.from_} applies to these weights; name it in the model card, {to / CARD}")


def training_config(name: str, source: EsmSource) -> TrainConfig:
    """Return the config that a run with the source's network would have, with this project's defaults of training.

    Commands read max_len, data.context and the diffusion process from it; the source does not record how it was
    trained.

    Args:
        name: name of the run.
    """
    cfg = OmegaConf.load(config_folder() / "train.yaml")
    assert isinstance(cfg, DictConfig)
    for entry in cfg.pop("defaults"):
        if isinstance(entry, DictConfig):
            ((group, option),) = entry.items()
            if option is not None:
                cfg[group] = OmegaConf.load(config_folder() / str(group) / f"{option}.yaml")
    del cfg["hydra"]
    cfg.run.name, cfg.data.max_len, cfg.time_conditioning = name, source.max_len, False
    return replace(read_config(cfg, TrainConfig, stored=True), model=network_of(source))


def main() -> None:
    """The command line."""
    run_verb(convert, "convert", ConvertConfig, rank0_only=True)


if __name__ == "__main__":
    main()
