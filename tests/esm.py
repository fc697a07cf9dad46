"""Random models with the architecture of ESM-2, for tests of conversion; transformers computes their logits."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

ESM_TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def random_esm(folder: Path, seed: int = 0, **options: Any) -> transformers.EsmForMaskedLM:
    """Write a model with random weights, biases and norms, its vocabulary and its tokenizer; return the model."""
    settings = {
        "vocab_size": len(ESM_TOKENS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 1,
        "mask_token_id": ESM_TOKENS.index("<mask>"),
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **options,
    }
    settings.setdefault("intermediate_size", 4 * settings["hidden_size"])
    model = transformers.EsmForMaskedLM(transformers.EsmConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.lower()
            scale = 0.2 if is_norm or parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(noise * scale + (1.0 if is_norm and name.endswith("weight") else 0.0))
        model.tie_weights()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(ESM_TOKENS))
    transformers.EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return model


def esm_ids(sequences: list[str]) -> tuple[Tensor, Tensor]:
    """Return ESM-2's token ids, padded, and the attention mask; `_` is a masked position and J is unknown to ESM-2."""
    longest = max(map(len, sequences)) + 2
    ids = torch.full((len(sequences), longest), ESM_TOKENS.index("<pad>"))
    for row, sequence in zip(ids, sequences, strict=True):
        letters = ["<cls>", *sequence, "<eos>"]
        names = {"_": "<mask>", "J": "<unk>"}
        row[: len(letters)] = torch.tensor([ESM_TOKENS.index(names.get(letter, letter)) for letter in letters])
    return ids, (ids != ESM_TOKENS.index("<pad>")).long()


def esm_logits(model: transformers.EsmForMaskedLM, sequences: list[str]) -> list[Tensor]:
    """Return transformers' logits of the 20 amino acids for each sequence, (residues + 2, 20).

    Each sequence is computed alone, because the token dropout of transformers 4.57 counts the padding of a batch as
    residues: a protein with masks then has other logits in a batch than alone.
    """
    columns = [ESM_TOKENS.index(letter) for letter in AMINO_ACIDS]
    return [model(esm_ids([sequence])[0]).logits[0, :, columns] for sequence in sequences]
