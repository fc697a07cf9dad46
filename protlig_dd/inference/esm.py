"""Read ESM-2 and models with its architecture, such as DPLM, from the files of transformers' EsmForMaskedLM.

ESM-2 (10.1126/science.ade2574) is a masked language model, and DPLM (arXiv 2402.18567) is ESM-2 trained further by
absorbing diffusion. Both predict the residues at masked positions and do not receive a noise level. They are therefore
networks of the absorbing graph with the parametrisation x0 and without time conditioning.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from protlig_dd.inference.exported import read_json
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.layers import EMBEDDING_STD, MLP_RATIO
from protlig_dd.system.files import sha256
from protlig_dd.tokenizer import BOS, EOS, LETTERS, MASK, N_STATES, PAD, VOCAB_SIZE

ESM_VOCABULARY = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
    *("<null_1>", "<mask>"),
)
SPECIAL = {MASK: "<mask>", BOS: "<cls>", EOS: "<eos>", PAD: "<pad>"}
FILES = ("config.json", "vocab.txt", "model*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
"""Files of weights without safetensors. They are read with weights_only=True, which does not run code from them."""

LFS = b"version https://git-lfs"  # how a file begins that Git LFS has not downloaded
ADAPTER = ", but an adapter of peft; merge it with its model first (merge_and_unload), and save the merged model"
MAX_POSITIONS = 1026  # transformers' default
EXTRA_POSITIONS = 4  # positions of ESM-2's embedding table besides the residues: 2 unused ones, <cls> and <eos>
IGNORED = ("esm.contact_head.", "esm.embeddings.position_embeddings.", "esm.embeddings.position_ids", "esm.pooler.")
"""First parts of the names of tensors that do not change the logits."""
BLOCK_LAYERS = {
    "attention_norm": ("attention.LayerNorm", (1,)),
    "attention_out": ("attention.output.dense", (1, 1)),
    "mlp_norm": ("LayerNorm", (1,)),
    "mlp.up": ("intermediate.dense", (MLP_RATIO, 1)),
    "mlp.down": ("output.dense", (1, MLP_RATIO)),
}
"""Our name of a layer in a block: the source's name, and the shape of the layer's weight in units of hidden_size."""
OTHER_LAYERS = {
    "head.norm": ("esm.encoder.emb_layer_norm_after", (1,)),
    "head.dense": ("lm_head.dense", (1, 1)),
    "head.dense_norm": ("lm_head.layer_norm", (1,)),
}


@dataclass(frozen=True)
class EsmSource:
    """The files of one model: config.json, the weights by transformers' names, and the checksum of their files."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    sha256: dict[str, str]
    """SHA-256 of each file of weights."""

    @property
    def max_len(self) -> int:
        """Maximum number of residues per protein in the model's training."""
        return int(self.config.get("max_position_embeddings", MAX_POSITIONS)) - EXTRA_POSITIONS


def read_esm(folder: Path) -> EsmSource:
    """Read a folder that transformers' EsmForMaskedLM can load, and check that the network and its tokens are ESM-2's.

    Raises:
        ValueError: a file is missing or damaged, the architecture is not ESM-2's, or the tokens have other ids. The
            message names the file.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{folder}: no config.json in it{ADAPTER if (folder / 'adapter_config.json').is_file() else ''}"
        )
    config = read_json(file)
    check_architecture(config, file)
    check_tokens(folder, config)
    weights, sums = read_weights(folder)
    return EsmSource(folder, config, weights, sums)


def check_architecture(config: Mapping[str, Any], file: Path) -> None:
    """Raise a ValueError unless config.json describes a network with the architecture of ESM-2."""
    if config.get("model_type") != "esm":
        architecture = ", ".join(map(str, config.get("architectures") or ["no architecture"]))
        raise ValueError(
            f"{file}: model_type={config.get('model_type')} ({architecture}); only ESM-2 and models with its "
            "architecture (model_type esm), such as DPLM, can be converted"
        )
    # transformers' own defaults, which apply if config.json leaves a key out
    for key, default, wanted in (
        ("position_embedding_type", "absolute", "rotary"),
        ("emb_layer_norm_before", None, None),
        ("is_folding_model", False, False),
        ("is_decoder", False, False),
        ("add_cross_attention", False, False),
        ("vocab_size", None, len(ESM_VOCABULARY)),
        ("hidden_act", "gelu", "gelu"),
    ):
        value = config.get(key, default)
        if (value or None) != (wanted or None):
            raise ValueError(f"{file}: {key}={value}, but ESM-2 has {key}={wanted}; this network cannot be converted")
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise ValueError(f"{file}: {key}={config.get(key)}; it must be a whole number of at least 1")
    for key in ("layer_norm_eps", "rope_theta"):
        if key in config and (isinstance(config[key], bool) or not isinstance(config[key], int | float)):
            raise ValueError(f"{file}: {key}={config[key]}; it must be a number")
    positions = config.get("max_position_embeddings", MAX_POSITIONS)
    if not isinstance(positions, int) or positions <= EXTRA_POSITIONS:
        raise ValueError(f"{file}: max_position_embeddings={positions}; it must be above {EXTRA_POSITIONS}")
    if config["intermediate_size"] != MLP_RATIO * config["hidden_size"]:
        raise ValueError(
            f"{file}: intermediate_size={config['intermediate_size']}, but hidden_size={config['hidden_size']} needs "
            f"{MLP_RATIO * config['hidden_size']}: ESM-2's inner layers are {MLP_RATIO} times as wide as its states"
        )


def check_tokens(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise a ValueError if config.json or vocab.txt gives a token another id than ESM-2."""
    for key, token in (("pad_token_id", "<pad>"), ("mask_token_id", "<mask>")):
        expected = ESM_VOCABULARY.index(token)
        if (found := config.get(key, expected)) != expected:
            raise ValueError(f"{folder / 'config.json'}: {key}={found}, but ESM-2's {token} has id {expected}")
    listed = {"config.json (vocab_list)": config.get("vocab_list")}
    if (vocabulary := folder / "vocab.txt").is_file():
        listed["vocab.txt"] = vocabulary.read_text().split()
    for name, tokens in listed.items():
        if tokens is None:
            continue
        if not isinstance(tokens, list):
            raise ValueError(f"{folder / name}: {tokens!r:.40} is not a list of tokens")
        if len(tokens) != len(ESM_VOCABULARY):
            raise ValueError(f"{folder / name}: {len(tokens)} tokens, but ESM-2 has {len(ESM_VOCABULARY)}")
        for number, (token, expected_token) in enumerate(zip(tokens, ESM_VOCABULARY, strict=True)):
            if token != expected_token:
                raise ValueError(f"{folder / name}: token {number} is {token!r}, but ESM-2's is {expected_token!r}")


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of all files of weights as float32, and the SHA-256 of each file.

    Files of safetensors are preferred. An index file lists the shards of large models.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise ValueError(f"{index}: damaged; weight_map must have the name of a file for each tensor")
            names = sorted(set(files.values()))
        else:
            names = [name] if (folder / (name := f"{stem}.{suffix}")).is_file() else []
        if not names:
            continue
        weights: dict[str, Tensor] = {}
        for name in names:
            if name != Path(name).name:
                raise ValueError(f"{index}: {name!r} is not the name of a file in this folder")
            weights |= load_file_of_weights(folder / name)
        return {name: tensor.float() for name, tensor in weights.items()}, {
            name: sha256(folder / name) for name in names
        }
    raise ValueError(f"{folder}: no weights; expected model.safetensors or pytorch_model.bin in it")


def load_file_of_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError), file.open("rb") as content:
            if content.read(len(LFS)) == LFS:
                raise ValueError(f"{file} is a pointer of Git LFS, not the weights; run `git lfs pull`") from error
        raise ValueError(f"{file}: cannot be read ({error})") from error
    except Exception as error:  # torch.load raises many types for a damaged file, or one that would run code
        raise ValueError(
            f"{file}: damaged, or a pickle with more than tensors, which could run code; use a model with safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file}: not a dictionary of tensors")
    return content


def network_of(source: EsmSource) -> ModelConfig:
    """Return the config of our network that computes the same function as the source's network."""
    config = source.config
    return ModelConfig(
        hidden_size=config["hidden_size"],
        n_heads=config["num_attention_heads"],
        n_blocks=config["num_hidden_layers"],
        cond_dim=1,  # not used, because the network does not receive the noise level
        dropout=0.0,
        attention_backend="auto",
        norm="layer",
        mlp="gelu_erf",
        qk_norm=False,
        checkpointing=False,
        tie_weights=bool(config.get("tie_word_embeddings", True)),
        attention_bias=True,
        norm_eps=float(config.get("layer_norm_eps", 1e-12)),  # transformers' default
        rotary_frequencies=rotary_frequencies(source),
        head="lm",
        token_dropout=bool(config.get("token_dropout", False)),
    )


def rotary_frequencies(source: EsmSource) -> list[float]:
    """Return the rotary frequencies that the source stores, or else those that transformers computes.

    ESM-2 was trained with frequencies that had been rounded to float16, so computed ones differ from the stored ones.

    Raises:
        ValueError: blocks with different frequencies.
    """
    stored = {name: tensor for name, tensor in source.weights.items() if name.endswith("rotary_embeddings.inv_freq")}
    for name, tensor in stored.items():
        first = next(iter(stored))
        if not torch.equal(tensor, stored[first]):
            raise ValueError(f"{source.folder}: {name} differs from {first}; ESM-2's blocks share their frequencies")
    if stored:
        return list(map(float, next(iter(stored.values()))))
    head_dim = source.config["hidden_size"] // source.config["num_attention_heads"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    return list(map(float, 1.0 / source.config.get("rope_theta", 10000.0) ** exponents))


def esm_token_ids() -> list[int]:
    """Return ESM-2's id of each of our token ids. J, which ESM-2 lacks, has the id of its <unk>."""
    tokens = [SPECIAL.get(i) or LETTERS[i] for i in range(VOCAB_SIZE)]
    return [ESM_VOCABULARY.index(token if token in ESM_VOCABULARY else "<unk>") for token in tokens]


def translate(source: EsmSource) -> dict[str, Tensor]:
    """Return the source's weights by the names of our network (`network_of`).

    The rows of the embedding and of the output projection are selected for our tokens. The tied output multiplies its
    input by gain / EMBEDDING_STD, so a gain of EMBEDDING_STD gives the source's logits.

    Raises:
        ValueError: a tensor is missing, is not part of the architecture, or contradicts config.json.
    """
    if not any(name.startswith("lm_head.") for name in source.weights):
        raise ValueError(
            f"{source.folder}: the weights have no lm_head; a model without it (EsmModel) cannot predict residues"
        )
    found = {renamed(name): tensor for name, tensor in source.weights.items() if not name.startswith(IGNORED)}
    used = {name for name in found if name.endswith("rotary_embeddings.inv_freq")}
    tokens, width = len(ESM_VOCABULARY), source.config["hidden_size"]

    def take(name: str, *shape: int) -> Tensor:
        if name not in found:
            raise ValueError(f"{source.folder}: the weights lack {name}")
        if tuple(found[name].shape) != shape:
            raise ValueError(
                f"{source.folder}: {name} has shape {tuple(found[name].shape)}, but hidden_size={width} and {tokens} "
                f"tokens need {shape}"
            )
        used.add(name)
        return found[name]

    ids = torch.tensor(esm_token_ids())
    embedding = take("esm.embeddings.word_embeddings.weight", tokens, width)
    weights = {"embedding.weight": embedding[ids]}
    layers = dict(OTHER_LAYERS)
    for i in range(source.config["num_hidden_layers"]):
        block = f"esm.encoder.layer.{i}"
        layers |= {f"blocks.{i}.{ours}": (f"{block}.{theirs}", shape) for ours, (theirs, shape) in BLOCK_LAYERS.items()}
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            parts = [take(f"{block}.attention.self.{part}.{kind}", *shape) for part in ("query", "key", "value")]
            weights[f"blocks.{i}.qkv.{kind}"] = torch.cat(parts)
    for ours, (theirs, factors) in layers.items():
        shape = tuple(factor * width for factor in factors)
        weights[f"{ours}.weight"] = take(f"{theirs}.weight", *shape)
        weights[f"{ours}.bias"] = take(f"{theirs}.bias", shape[0])
    states = ids[:N_STATES]
    weights["head.out.bias"] = take("lm_head.bias", tokens)[states]
    if source.config.get("tie_word_embeddings", True):
        weights["head.out.gain"] = torch.full((width,), EMBEDDING_STD)
        decoder = found.get("lm_head.decoder.weight", embedding)
        used.add("lm_head.decoder.weight")
        if not torch.equal(decoder, embedding):
            raise ValueError(
                f"{source.folder}: lm_head.decoder.weight differs from the embedding, but config.json has "
                "tie_word_embeddings=true"
            )
    else:
        weights["head.out.weight"] = take("lm_head.decoder.weight", tokens, width)[states]
    if torch.equal(found.get("lm_head.decoder.bias", torch.empty(0)), found["lm_head.bias"]):
        used.add("lm_head.decoder.bias")
    if left_over := sorted(found.keys() - used):
        raise ValueError(f"{source.folder}: {left_over[0]} is not part of ESM-2's architecture")
    return weights


def renamed(name: str) -> str:
    """Return a tensor's name with `weight` and `bias` for the names that transformers' files may use in norms."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
