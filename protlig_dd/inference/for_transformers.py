"""The files with which Hugging Face transformers loads an exported model: a file of code, and a tokenizer.

protlig_dd writes these files, but never reads or runs those of an exported model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from protlig_dd.config.components import build_graph, build_noise
from protlig_dd.system.tables import as_json
from protlig_dd.tokenizer import BOS, EOS, MASK, PAD

MODELING = "modeling_protlig_dd"
CODE, TOKENIZER, TOKENIZER_CONFIG = f"{MODELING}.py", "tokenizer.json", "tokenizer_config.json"
FILES = (CODE, TOKENIZER, TOKENIZER_CONFIG)
CLASSES = {
    "AutoConfig": "ProteinDiffusionConfig",
    "AutoModel": "ProteinDiffusionModel",
    "AutoModelForMaskedLM": "ProteinDiffusionForMaskedLM",
}
SUPPORTED = {
    "positions": ("rope", "sinusoidal", "none"),
    "mixers": ("attention",),
    "norm": ("rms", "layer"),
    "mlp": ("gelu", "gelu_erf", "geglu", "swiglu", "relu2"),
    "head": ("linear", "lm"),
}
"""The kinds of parts that modeling_protlig_dd.py can compute. The first is the default of a missing key."""

SPECIAL = {"<mask>": MASK, "<bos>": BOS, "<eos>": EOS, "<pad>": PAD}


def unsupported(model: Mapping[str, Any]) -> str | None:
    """Return the part of a network that transformers cannot compute, as `model.positions=t5`; None if there is none.

    Args:
        model: the key `model` of config.json.
    """
    kinds = {key: model.get(key, choices[0]) for key, choices in SUPPORTED.items()}
    return next((f"model.{key}={kind}" for key, kind in kinds.items() if kind not in SUPPORTED[key]), None)


def keys_for_transformers(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that transformers needs in config.json; {} if it cannot compute the network.

    `sigma_range`, for a network with time conditioning, has the total noise at t_min and at t = 1.
    """
    if unsupported(description["model"]):
        return {}
    keys = {
        "model_type": "protlig_dd",
        "architectures": [CLASSES["AutoModelForMaskedLM"]],
        "auto_map": {auto: f"{MODELING}.{name}" for auto, name in CLASSES.items()},
    }
    if not description["time_conditioning"]:
        return keys
    noise = build_noise(description["noise"], build_graph(description["graph"]))
    return keys | {"sigma_range": noise(torch.tensor([noise.t_min, 1.0]))[0].tolist()}


def write_for_transformers(folder: Path, description: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    """Write the files with which transformers loads the model, unless it cannot compute the network.

    Args:
        ids: the token ids by letter or name.
    """
    if unsupported(description["model"]):
        return
    (folder / CODE).write_text((Path(__file__).parent / CODE).read_text())
    (folder / TOKENIZER).write_text(as_json(tokenizer(ids)))
    (folder / TOKENIZER_CONFIG).write_text(as_json(tokenizer_config(description["max_len"])))


def tokenizer(ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of tokenizer.json, the format of the package tokenizers.

    Each letter is a token, between <bos> and <eos>. The letters and <mask> have the ids of ProteinTokenizer. Any other
    character is an error, because the vocabulary does not contain a token for unknown letters.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos, sequence, eos = (
        {"SpecialToken": {"id": "<bos>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<eos>", "type_id": 0}},
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **flags} for name, number in SPECIAL.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, sequence, eos],
            "pair": [bos, sequence, eos, {"Sequence": {"id": "B", "type_id": 1}}, eos],
            "special_tokens": {
                name: {"id": name, "ids": [SPECIAL[name]], "tokens": [name]} for name in ("<bos>", "<eos>")
            },
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": dict(ids), "unk_token": "<unk>"},
    }


def tokenizer_config(max_len: int) -> dict[str, Any]:
    """Return the content of tokenizer_config.json.

    Args:
        max_len: residues of the longest training proteins. transformers warns about longer sequences.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len + 2,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **{f"{name[1:-1]}_token": name for name in SPECIAL},
    }
