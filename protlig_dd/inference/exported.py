"""An exported model: a folder with everything needed to use the model.

    model.safetensors    the averaged weights
    config.json          network, graph, noise, parametrisation; lengths of the training proteins; the run's name, step,
                         data and training settings; evaluation report
    vocabulary.json      token ids
    README.md            the model card

protlig_dd reads these files. It runs no code from the folder. Reading needs neither Hydra nor HDF5.

Hugging Face transformers reads the weights, config.json and three other files. They are written unless transformers
cannot compute the network (see for_transformers.py).

    modeling_protlig_dd.py                   the network; transformers runs this code if trust_remote_code=True
    tokenizer.json, tokenizer_config.json    the tokenizer
"""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from protlig_dd.inference import for_transformers
from protlig_dd.model.config import LoraConfig, stored_model
from protlig_dd.system.files import sha256
from protlig_dd.system.tables import as_json, as_written
from protlig_dd.tokenizer import BOS, EOS, LETTERS, MASK, N_STATES, PAD

FORMAT, FORMAT_VERSION = "protlig_dd", 1
WEIGHTS, DESCRIPTION, VOCABULARY, CARD = "model.safetensors", "config.json", "vocabulary.json", "README.md"
READ = (WEIGHTS, DESCRIPTION, VOCABULARY, CARD)
"""The files that protlig_dd reads."""
EXPORTED = (*READ, *for_transformers.FILES)
DEFAULT_KINDS = {
    "mixers": "attention",
    "positions": "rope",
    "mlp": "gelu",
    "norm": "rms",
    "qk_norm": True,
    "tie_weights": False,
    "attention_bias": False,
    "head": "linear",
    "token_dropout": False,
}
"""The kind of each part of the networks in configs/model/*.yaml. The model card lists only parts of another kind."""


def is_exported(folder: Path) -> bool:
    return (folder / DESCRIPTION).is_file()


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of an exported model's config.json, after checking the vocabulary and the weights' checksum.

    Raises:
        ValueError: a file is missing or damaged, or its format version or vocabulary is not that of this version of
            protlig_dd. The message names the file.
    """
    file = folder / DESCRIPTION
    description = read_json(file)
    if description.get("format") != FORMAT and description.get("model_type") == "esm":
        raise ValueError(
            f"{folder} is a model of transformers with the architecture of ESM-2; convert it first: "
            f"python -m protlig_dd.convert from={folder} to=FOLDER"
        )
    if description.get("format") != FORMAT:
        raise ValueError(f"{file}: not a model that protlig_dd has exported")
    if (version := description.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{file} has format {version}; this version of protlig_dd reads only format {FORMAT_VERSION}")
    if isinstance(description.get("model"), dict):
        description["model"] = stored_model(description["model"])
    if not (folder / VOCABULARY).is_file() and "transformers_version" in description:
        raise ValueError(
            f"{folder}: saved by transformers, and protlig_dd reads only models that it has written itself; load the "
            "weights into the exported model that they were made from (docs/sharing.md)"
        )
    if read_json(folder / VOCABULARY) != vocabulary():
        raise ValueError(f"{folder / VOCABULARY}: token ids differ from those of this version of protlig_dd")
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{weights}: no such file")
    found, written = sha256(weights), str(description.get("weights_sha256"))
    if found != written:
        raise ValueError(f"{weights}: SHA-256 is {found[:12]}, but {file} records {written[:12]}")
    return description


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object")
    return content


def write_exported(
    folder: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any], card: str | None = None
) -> None:
    """Write weights, description, vocabulary, model card and the files for transformers to a new folder.

    The checksum of the weights and the keys for transformers are added to the description.

    Args:
        description: the content of config.json, with or without the checksum of the weights. If it has the checksum of
            other weights, its report and `card` are left out, because they describe the other weights.
        card: the text of an existing README.md for these weights. If it is None, a new model card is written.
    """
    folder.mkdir()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    found = sha256(folder / WEIGHTS)
    if description.get("weights_sha256", found) != found:
        description, card = {**description, "report": None}, None
    keys = for_transformers.keys_for_transformers(description)
    description = {**description, "weights_sha256": found, **keys}
    (folder / DESCRIPTION).write_text(as_json(description))
    (folder / VOCABULARY).write_text(as_json(vocabulary()))
    (folder / CARD).write_text(card or model_card(description))
    for_transformers.write_for_transformers(folder, description, vocabulary()["ids"])
    # safetensors writes files that only their owner can read; give the weights the permissions of the card
    (folder / WEIGHTS).chmod(stat.S_IMODE((folder / CARD).stat().st_mode))


def vocabulary() -> dict[str, Any]:
    """Return the content of vocabulary.json: the token ids by letter or name, and the number of diffused states.

    The diffused states are the amino acids, with the ids 0 to n_states - 1.
    """
    ids = {letter: i for i, letter in enumerate(LETTERS) if i != MASK}
    return {"n_states": N_STATES, "ids": ids | {"<mask>": MASK, "<bos>": BOS, "<eos>": EOS, "<pad>": PAD}}


def model_card(description: Mapping[str, Any]) -> str:
    """Return the text of README.md: what the model is, its evaluation and how to load it.

    The text contains no licence: the user has to choose one.
    """
    model, training = description["model"], description["training"]
    kinds = kinds_of_parts(model)
    graph = " ".join(str(description["graph"][key]) for key in ("name", "matrix") if key in description["graph"])
    lines = [
        "---",
        "library_name: protlig_dd",
        "tags: [protein, protein-language-model, discrete-diffusion]",
        "# license: choose one and uncomment this line",
        "---",
        f"# {description['run']}",
        "",
        "ESM-2 or a model with its architecture, a masked language model, converted for protlig_dd."
        if converted(description)
        else "A protein language model by score-entropy discrete diffusion (SEDD, arXiv 2310.16834).",
        "",
        "| | |",
        "| --- | --- |",
        f"| network | {model['n_blocks']} blocks, width {model['hidden_size']}, {model['n_heads']} heads{kinds} |",
        f"| graph | {graph}, {description['parametrisation']}, "
        f"{'with' if description['time_conditioning'] else 'without'} time conditioning |",
        *([] if converted(description) else [f"| noise | {description['noise']['name']} |"]),
        *([f"| context | {case}-case residues are given (data.context) |"] if (case := context_in(training)) else []),
        *origin_lines(description),
        f"| weights, SHA-256 | {description['weights_sha256']} |",
        f"| made by | protlig_dd {description['protlig_dd']} |",
        "",
        "## Measured",
        "",
        *(["This model has not been measured."] if converted(description) else report_lines(description["report"])),
        "",
        "## Use",
        "",
        "protlig_dd is not on a package index: run `pip install .` in a checkout of it, or build a wheel there with",
        f"`pip wheel --no-deps .` and install protlig_dd-{description['protlig_dd']}-py3-none-any.whl. Then load the",
        "model in Python:",
        "",
        "```python",
        "from protlig_dd.hub import ProteinDiffusion",
        "",
        'model = ProteinDiffusion.from_pretrained("this folder, or owner/name on the Hugging Face Hub")',
        "```",
        "",
        "Or pass `from=FOLDER` to a protlig_dd command, for example `sample`, `embed` or `training` (to fine-tune it).",
        "",
        *transformers_lines(description),
    ]
    return "\n".join(lines)


def transformers_lines(description: Mapping[str, Any]) -> list[str]:
    """Return the lines of the model card about transformers; [] if transformers cannot load the model."""
    if "auto_map" not in description:
        return []
    sigma = ", sigma=torch.tensor([0.5])" if description["time_conditioning"] else ""
    return [
        "Hugging Face transformers (4.48 or later) does not need protlig_dd: it runs the code in this folder.",
        "",
        "```python",
        *(["import torch"] if sigma else []),
        "from transformers import AutoModelForMaskedLM, AutoTokenizer",
        "",
        'name = "this folder, or owner/name on the Hugging Face Hub"',
        "tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "model = AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=True)",
        f'logits = model(**tokenizer("MKT<mask>YIAK", return_tensors="pt"){sigma}).logits  # (1, tokens, 30)',
        "```",
        "",
    ]


def converted(description: Mapping[str, Any]) -> bool:
    """Whether the weights were converted from another project's model and have not been trained since."""
    return description.get("converted_from") is not None and not description.get("fine_tuned_from")


def origin_lines(description: Mapping[str, Any]) -> list[str]:
    """Return the lines of the model card's table that say where the weights come from."""
    lines = []
    if (source := description.get("converted_from")) is not None:
        revision = f", revision {source['revision']}" if source["revision"] else ""
        commit = f"{revision}, commit {source['commit']}" if source["commit"] else ""
        files = "; ".join(f"{name} {checksum}" for name, checksum in source["sha256"].items())
        how = "converted from" if converted(description) else "derived from"
        lines = [
            f"| {how} | {source['name']}{commit}; its licence applies to these weights |",
            f"| files of the source, SHA-256 | {files} |",
        ]
    if converted(description):
        return [*lines, f"| longest protein | {description['max_len']} residues |"]
    origin, lora = description.get("fine_tuned_from"), description.get("lora")
    adapters = "" if lora is None else f" by {LoraConfig(**lora).description}, merged with the other weights"
    return [
        *lines,
        f"| trained on | proteins of up to {description['max_len']} residues; data {description['data_fingerprint']}"
        f"{f'; members {members}' if (members := description.get('members_fingerprint')) else ''} |",
        *([f"| fine-tuned from | {origin}{adapters} |"] if origin else []),
        f"| steps | {description['step']}, seed {description['training']['seed']}; averaged weights |",
    ]


def kinds_of_parts(model: Mapping[str, Any]) -> str:
    """Return the parts of the network whose kind is not the default, as in `; positions t5; tie_weights true`."""
    kinds = {key: model.get(key, default) for key, default in DEFAULT_KINDS.items()}
    named = [f"; {key} {as_written(kind)}" for key, kind in kinds.items() if kind != DEFAULT_KINDS[key]]
    return "".join(named)


def context_in(training: Mapping[str, Any]) -> str | None:
    """Return the letter case of residues that training gave to the network as context; None without context."""
    context = training["data"].get("context")
    return None if context == "none" else context


def report_lines(report: Mapping[str, Any] | None) -> list[str]:
    """Return the lines of a run's report in Markdown."""
    if report is None:
        return ["The run has no report of this step."]
    # a standard error that cannot be computed, as for a single protein, is null in the report and NaN in the card
    report = {key: float("nan") if value is None else value for key, value in report.items()}
    leaks: Mapping[str, Any] = report.get("in_training") or {}
    counted = f"residues (at most the first {report['max_len']} of each protein)"
    if "context" in report:
        counted = f"designed residues given the {report['context']}-case residues"
    copied = []
    if leaks.get("copies"):
        copied = ["", f"Exact copies of training proteins of the model: {leaks['copies']}."]
        if others := leaks.get("others"):
            others = {key: float("nan") if value is None else value for key, value in others.items()}
            copied[1] += (
                f" Over the other {others['sequences']} proteins the bound is {others['nll']:.4f} ± "
                f"{others['nll_se']:.4f}, and the paired difference to the unigram model is "
                f"{others['difference']:+.4f} ± {others['difference_se']:.4f}."
            )
    return [
        f"On {report['sequences']} proteins of the {report['split']} split, {report['residues']:,} {counted}, "
        f"{report['estimator']} estimator, {report['draws']} draws; "
        "nats/residue, ± one standard error over proteins:",
        "",
        "| | |",
        "| --- | --- |",
        f"| bound on the negative log-likelihood | {report['nll']:.4f} ± {report['nll_se']:.4f} |",
        f"| unigram model | {report['unigram_nll']:.4f} ± {report['unigram_nll_se']:.4f} |",
        f"| difference to the unigram model, paired | {report['difference']:+.4f} ± {report['difference_se']:.4f} |",
        *copied,
    ]
