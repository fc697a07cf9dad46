"""The network of an exported protlig_dd model, for Hugging Face transformers (version 4.40 or later, and version 5).

Exported models contain a copy of this file and of layers_protlig_dd.py. AutoModel and AutoModelForMaskedLM run the
copies if trust_remote_code=True. They need only torch and transformers. protlig_dd itself never runs them.

A batch is padded, not packed. Shape suffixes: n sequences, L tokens of the longest sequence, V = 30 tokens of the
vocabulary, H hidden_size, C cond_dim.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from .layers_protlig_dd import (
    N_STATES,
    Block,
    Head,
    SigmaEmbedding,
    drop_masked,
    rotary_tables,
    sinusoids,
    unsupported,
)

BOS, EOS, PAD, VOCAB_SIZE = 27, 28, 29, 30
NOT_PREDICTED = (
    -1e4
)  # logit of the other ten tokens: their probability is 0, and p log p stays finite, unlike with -inf
IGNORED = -100  # label of positions that do not count in the loss


class ProteinDiffusionConfig(PretrainedConfig):
    """The content of an exported model's config.json, and the names that transformers uses for the network's sizes.

    The network reads the keys `model` (sizes, and kinds of its parts), `time_conditioning`, `parametrisation` and
    `sigma_range`. The checksum and the report of the exported weights are left out, because weights that transformers
    saves may be others.
    """

    model_type = "protlig_dd"

    def __init__(self, **keys: Any) -> None:
        keys = {key: value for key, value in keys.items() if key not in ("weights_sha256", "report")}
        network = {"model": {}, "time_conditioning": False, "parametrisation": "x0", "sigma_range": None}
        ids = {"vocab_size": VOCAB_SIZE, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
        # transformers must not tie weights: with model.tie_weights, Head itself uses the embedding
        super().__init__(**{**network, **ids, "tie_word_embeddings": False, **keys})

    @property
    def hidden_size(self) -> int:
        return int(self.model["hidden_size"])

    @property
    def num_hidden_layers(self) -> int:
        return int(self.model["n_blocks"])

    @property
    def num_attention_heads(self) -> int:
        return int(self.model["n_heads"])


class ProteinDiffusionModel(PreTrainedModel):
    """Maps token ids to hidden states. It has all weights of the file, including those that only the logits need."""

    config_class = ProteinDiffusionConfig
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: ProteinDiffusionConfig) -> None:
        super().__init__(config)
        model, cond_dim = config.model, config.model["cond_dim"] if config.time_conditioning else None
        if part := unsupported(model):
            raise ValueError(f"transformers cannot compute {part}; use ProteinDiffusion of protlig_dd")
        self.embedding = nn.Embedding(VOCAB_SIZE, config.hidden_size)
        self.sigma_embedding = None if cond_dim is None else SigmaEmbedding(cond_dim)
        self.blocks = nn.ModuleList(Block(model, cond_dim) for _ in range(config.num_hidden_layers))
        self.head = Head(model, cond_dim)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, **options: Any) -> Any:
        """Load a model as transformers does, but raise a ValueError unless the file has exactly the network's tensors.

        transformers alone would initialise missing tensors and log a warning.
        """
        wants_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(name, *arguments, output_loading_info=True, **options)
        for problem in ("missing", "mismatched", "unexpected"):
            if tensors := sorted(map(str, info[f"{problem}_keys"])):
                raise ValueError(f"{name}: the weights do not fit config.json: {problem} {', '.join(tensors)}")
        return (model, info) if wants_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Change nothing: `from_pretrained` loads every weight, and a loaded weight must not be initialised again."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sigma: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return the hidden states after the final norm, (n, L, H), as `last_hidden_state`.

        Args:
            input_ids: (n, L) token ids.
            attention_mask: (n, L), 1 for tokens and 0 for padding; None: every token except <pad> is read.
            sigma: (n,), the total noise of each sequence, for networks with time conditioning. With the absorbing graph
                sigma = -log(1 - m) if a fraction m of the residues is masked. `config.sigma_range` has the limits.
            output_hidden_states: whether to return `hidden_states` too: the embedding, the states after each block but
                the last, and `last_hidden_state`.
            return_dict: False for a tuple.

        Raises:
            ValueError: wrong shapes or ids, no sigma for a network with time conditioning, or a sigma for another.
        """
        states = self.states(input_ids, attention_mask, sigma)
        return self.chosen(BaseModelOutput(states[-1], tuple(states)), output_hidden_states, return_dict)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None, sigma: Tensor | None) -> list[Tensor]:
        """Return the embedding, the states after each block but the last, and those after the final norm: (n, L, H)."""
        read_nL, model = checked_mask(input_ids, attention_mask), self.config.model
        cond_nC = self.condition(sigma, input_ids)
        positions_nL, rotation = (read_nL.cumsum(1) - 1).clamp(min=0), None
        x_nLH = self.embedding(input_ids)
        if model.get("token_dropout", False):
            x_nLH = drop_masked(x_nLH, input_ids, read_nL)
        if model.get("positions", "rope") == "rope":
            head_dim = model["hidden_size"] // model["n_heads"]
            rotation = rotary_tables(positions_nL, head_dim, model.get("rotary_frequencies"))
        elif model["positions"] == "sinusoidal":
            x_nLH = x_nLH + model["sinusoid_scale"] * sinusoids(positions_nL, model["hidden_size"]).to(x_nLH.dtype)
        states = [x_nLH]
        for block in self.blocks:
            states.append(block(states[-1], cond_nC, read_nL[:, None, None, :], rotation))
        states[-1] = self.head.normed(states[-1], cond_nC)
        return states

    def condition(self, sigma: Tensor | None, input_ids: Tensor) -> Tensor | None:
        """Return the embedding of sigma, (n, C); None without time conditioning.

        Raises:
            ValueError: sigma is missing, has a wrong shape, or has no effect.
        """
        if self.sigma_embedding is None:
            if sigma is not None:
                raise ValueError("this network does not read sigma (time_conditioning=false); leave it out")
            return None
        n = len(input_ids)
        low, high = self.config.sigma_range or (0.0, math.inf)
        expected = (
            f"a tensor ({n},) with the total noise of each sequence, {low:.4g} (clean) to {high:.4g} (pure noise)"
        )
        if sigma is None:
            raise ValueError(f"this network reads the noise level (time_conditioning=true): give sigma, {expected}")
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=input_ids.device)
        if tuple(sigma.shape) != (n,):
            raise ValueError(f"sigma has shape {tuple(sigma.shape)}: give {expected}")
        return self.sigma_embedding(sigma)

    def chosen(self, output: Any, output_hidden_states: bool | None, return_dict: bool | None) -> Any:
        """Return the output in the form that the arguments, or else the config, choose."""
        if not (self.config.output_hidden_states if output_hidden_states is None else output_hidden_states):
            output = type(output)(**{key: value for key, value in output.items() if key != "hidden_states"})
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class ProteinDiffusionForMaskedLM(ProteinDiffusionModel):
    """Maps token ids to logits."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sigma: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Return the logits of the whole vocabulary, (n, L, V), as `logits`.

        The first 20 are the network's logits of the amino acids. The other ten are NOT_PREDICTED, so the softmax is a
        distribution of the amino acids.

        Args:
            input_ids, attention_mask, sigma, output_hidden_states, return_dict: see `ProteinDiffusionModel.forward`.
            labels: (n, L) token ids; `loss` is their mean cross-entropy, in nats. Labels that are not amino acids
                (-100, <bos>, X, ...) do not count.

        Raises:
            ValueError: see `ProteinDiffusionModel.forward`; or labels for a network whose logits are log-scores.
        """
        if labels is not None and self.config.parametrisation != "x0":
            raise ValueError(
                f"labels: the logits of this network are scores (parametrisation={self.config.parametrisation}), not "
                "log-probabilities, so they have no cross-entropy; train it with protlig_dd"
            )
        states = self.states(input_ids, attention_mask, sigma)
        logits, loss = self.head(states[-1], self.embedding.weight), None
        if labels is not None:
            labels = labels.masked_fill(labels >= N_STATES, IGNORED)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        logits = F.pad(logits, (0, VOCAB_SIZE - N_STATES), value=NOT_PREDICTED)
        return self.chosen(MaskedLMOutput(loss, logits, tuple(states)), output_hidden_states, return_dict)


def checked_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return which tokens are read, (n, L) bool.

    Raises:
        ValueError: ids or mask of another shape, ids outside 0..29, or a sequence without tokens.
    """
    shape = tuple(input_ids.shape)
    if len(shape) != 2:
        raise ValueError(f"input_ids must be (sequences, tokens), got shape {shape}")
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids has {shape}")
    read_nL = input_ids != PAD if attention_mask is None else attention_mask.bool()
    if not torch.compiler.is_compiling():
        wrong = input_ids[(input_ids < 0) | (input_ids >= VOCAB_SIZE)]
        if len(wrong):
            raise ValueError(f"input_ids has the id {int(wrong[0])}; protlig_dd has the ids 0 to {VOCAB_SIZE - 1}")
        if not bool(read_nL.any(1).all()):
            raise ValueError("a sequence has no tokens: all are <pad>, or attention_mask is 0 for all")
    return read_nL
