"""The network of an exported protlig_dd model, for Hugging Face transformers (version 4.48 or later, and version 5).

Exported models contain a copy of this file. AutoModel and AutoModelForMaskedLM run the copy if trust_remote_code=True.
It needs only torch and transformers. protlig_dd itself never runs it. The names of the modules are those of the tensors
in model.safetensors.

A batch is padded, not packed. Shape suffixes: n sequences, L tokens of the longest sequence, V = 30 tokens of the
vocabulary, H hidden_size, C cond_dim.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

N_STATES, MASK, BOS, EOS, PAD, VOCAB_SIZE = 20, 20, 27, 28, 29, 30  # ids 0..19 are the amino acids
NOT_PREDICTED = -1e4  # logit of the other ten tokens: their p is 0, and p log p is finite, unlike with -inf
IGNORED = -100  # label of positions that do not count in the loss
SINUSOIDS, BASE = 256, 10000.0  # width of the sinusoidal embedding of sigma; base of sinusoids and rotary angles
EMBEDDING_STD, RMS_EPS, LAYER_EPS = 0.02, 1e-6, 1e-5
TRAINED_MASK_RATIO = 0.15 * 0.8  # ESM-2 chose 15% of the tokens for its loss and replaced 80% of these by <mask>

Rotation = tuple[Tensor, Tensor] | None
"""Cosines and sines of the rotary encoding's angles, each (n, 1, L, head_dim / 2); None for another encoding."""


class ProteinDiffusionConfig(PretrainedConfig):
    """The content of an exported model's config.json, and the names that transformers uses for the network's sizes.

    The network reads the keys `model` (sizes, and kinds of its parts), `graph`, `time_conditioning`, `parametrisation`
    and `sigma_range`. The checksum and the report of the exported weights are left out, because weights that
    transformers saves may be others.
    """

    model_type = "protlig_dd"

    def __init__(self, **keys: Any) -> None:
        keys = {key: value for key, value in keys.items() if key not in ("weights_sha256", "report")}
        network = {"model": {}, "graph": {}, "time_conditioning": False, "parametrisation": "x0", "sigma_range": None}
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
        if (positions := model.get("positions", "rope")) not in ("rope", "sinusoidal", "none"):
            raise ValueError(f"transformers cannot compute model.positions={positions}; use protlig_dd")
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
        read_nL, model = checked_mask(input_ids, attention_mask), self.config.model
        cond_nC, positions_nL = self.condition(sigma, input_ids), (read_nL.cumsum(1) - 1).clamp(min=0)
        x_nLH, rotation = self.embedding(input_ids), None
        if model.get("token_dropout", False):
            x_nLH = drop_masked(x_nLH, input_ids, read_nL)
        if model.get("positions", "rope") == "rope":
            head_dim = model["hidden_size"] // model["n_heads"]
            rotation = rotary_tables(positions_nL, head_dim, model.get("rotary_frequencies"))
        elif model["positions"] == "sinusoidal":
            x_nLH = x_nLH + model["sinusoid_scale"] * sinusoids(positions_nL, model["hidden_size"]).to(x_nLH.dtype)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = []
        for block in self.blocks:
            states += [x_nLH] if keep else []
            x_nLH = block(x_nLH, cond_nC, read_nL[:, None, None, :], rotation)
        last_nLH = self.head.normed(x_nLH, cond_nC)
        return self.formatted(BaseModelOutput(last_nLH, (*states, last_nLH) if keep else None), return_dict)

    def formatted(self, output: Any, return_dict: bool | None) -> Any:
        """Return the output as it is or as a tuple; return_dict=None means that the config decides."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

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
        expected = f"a tensor ({n},), the total noise of each sequence, {low:.4g} (clean) to {high:.4g} (pure noise)"
        if sigma is None:
            raise ValueError(f"this network reads the noise level (time_conditioning=true): give sigma, {expected}")
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=input_ids.device)
        if tuple(sigma.shape) != (n,):
            raise ValueError(f"sigma has shape {tuple(sigma.shape)}: give {expected}")
        return self.sigma_embedding(sigma)


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

        The first 20 are the network's logits of the amino acids. The other ten are NOT_PREDICTED, so a softmax gives
        their tokens the probability 0.

        Args:
            input_ids, attention_mask, sigma, output_hidden_states, return_dict: see `ProteinDiffusionModel.forward`.
            labels: (n, L) token ids; `loss` is their mean cross-entropy, in nats. Labels that are not amino acids
                (-100, <bos>, X, ...) do not count.

        Raises:
            ValueError: see `ProteinDiffusionModel.forward`; or labels for a network whose logits are log-scores.
        """
        graph, parametrisation = self.config.graph.get("name"), self.config.parametrisation
        if labels is not None and parametrisation != "x0" and graph != "absorbing":
            raise ValueError(
                f"labels: the logits of this network are scores (parametrisation={parametrisation}, graph={graph}), "
                "not log-probabilities, so they have no cross-entropy; train it with protlig_dd"
            )
        output = super().forward(input_ids, attention_mask, sigma, output_hidden_states, True)
        logits, loss = self.head(output.last_hidden_state, self.embedding.weight), None
        if labels is not None:
            labels = labels.masked_fill(labels >= N_STATES, IGNORED)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        logits = F.pad(logits, (0, VOCAB_SIZE - N_STATES), value=NOT_PREDICTED)
        return self.formatted(MaskedLMOutput(loss, logits, output.hidden_states), return_dict)


class Block(nn.Module):
    """Pre-norm transformer block: norm, attention, norm, MLP. With time conditioning adaLN modulates both parts.

    Args:
        model: the key `model` of config.json.
        cond_dim: width of the embedding of sigma; None without time conditioning.
    """

    def __init__(self, model: dict[str, Any], cond_dim: int | None) -> None:
        super().__init__()
        width, bias, timed = model["hidden_size"], model.get("attention_bias", False), cond_dim is not None
        self.n_heads, self.dropout = model["n_heads"], model["dropout"]
        self.adaln = None if cond_dim is None else nn.Linear(cond_dim, 6 * width)
        self.attention_norm = make_norm(model, modulated=timed)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        head_norms = (RMSNorm(width // self.n_heads, eps=RMS_EPS) if model["qk_norm"] else None for _ in "qk")
        self.q_norm, self.k_norm = head_norms
        self.attention_out = nn.Linear(width, width, bias=bias)
        self.mlp_norm = make_norm(model, modulated=timed)
        self.mlp = MLP(width, model["mlp"])

    def forward(self, x_nLH: Tensor, cond_nC: Tensor | None, read_n11L: Tensor, rotation: Rotation) -> Tensor:
        """Return the residual stream after this block, (n, L, H).

        Args:
            cond_nC: the embedding of each sequence's sigma; None without time conditioning.
            read_n11L: True for tokens, False for padding, which no token attends to.
            rotation: tables of the rotary encoding.
        """
        drop = partial(F.dropout, p=self.dropout, training=self.training)
        if self.adaln is None:
            x_nLH = x_nLH + drop(self.attention(self.attention_norm(x_nLH), read_n11L, rotation))
            return x_nLH + drop(self.mlp(self.mlp_norm(x_nLH)))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaln(cond_nC).unsqueeze(1).chunk(6, dim=-1)
        hidden = self.attention_norm(x_nLH) * (1 + scale_a) + shift_a
        x_nLH = x_nLH + gate_a * drop(self.attention(hidden, read_n11L, rotation))
        hidden = self.mlp_norm(x_nLH) * (1 + scale_m) + shift_m
        return x_nLH + gate_m * drop(self.mlp(hidden))

    def attention(self, x_nLH: Tensor, read_n11L: Tensor, rotation: Rotation) -> Tensor:
        """Return the output of attention. Each token attends to the tokens of its sequence, in both directions."""
        q, k, v = self.qkv(x_nLH).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (n, heads, L, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotated(q, *rotation), rotated(k, *rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=read_n11L)
        return self.attention_out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them. In geglu and swiglu half of the width gates the rest."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind, gated = kind, kind in ("geglu", "swiglu")
        inner = 8 * round(8 * width / 3 / 8) if gated else 4 * width
        self.up = nn.Linear(width, 2 * inner if gated else inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x_nLH: Tensor) -> Tensor:
        x = self.up(x_nLH)
        if self.kind == "gelu":
            x = F.gelu(x, approximate="tanh")
        elif self.kind == "gelu_erf":
            x = F.gelu(x)
        elif self.kind == "relu2":
            x = F.relu(x).square()
        else:
            gate, x = x.chunk(2, dim=-1)
            x = (F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * x
        return self.down(x)


class Head(nn.Module):
    """Final norm and the projection to the logits of the 20 amino acids."""

    def __init__(self, model: dict[str, Any], cond_dim: int | None) -> None:
        super().__init__()
        width, lm = model["hidden_size"], model.get("head", "linear") == "lm"
        self.adaln = None if cond_dim is None else nn.Linear(cond_dim, 2 * width)
        self.norm = make_norm(model, modulated=cond_dim is not None)
        self.dense = nn.Linear(width, width) if lm else None
        self.dense_norm = make_norm(model, modulated=False) if lm else None
        self.out = TiedOutput(width) if model.get("tie_weights", False) else nn.Linear(width, N_STATES)

    def normed(self, x_nLH: Tensor, cond_nC: Tensor | None) -> Tensor:
        """Return the hidden states after the final norm and its modulation."""
        x_nLH = self.norm(x_nLH)
        if self.adaln is None:
            return x_nLH
        shift, scale = self.adaln(cond_nC).unsqueeze(1).chunk(2, dim=-1)
        return x_nLH * (1 + scale) + shift

    def forward(self, x_nLH: Tensor, embedding_VH: Tensor) -> Tensor:
        """Return the logits of the amino acids, (n, L, 20), in float32 even if the weights are bf16."""
        if self.dense is not None and self.dense_norm is not None:
            x_nLH = self.dense_norm(F.gelu(self.dense(x_nLH)))
        with torch.autocast(x_nLH.device.type, enabled=False):
            wide = widened(x_nLH)
            if isinstance(self.out, TiedOutput):
                return self.out(wide, embedding_VH)
            return F.linear(wide, self.out.weight.to(wide.dtype), self.out.bias.to(wide.dtype))


class TiedOutput(nn.Module):
    """Projection with the embedding's rows: the logit of amino acid a is (gain x) . e_a / EMBEDDING_STD + bias_a."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(N_STATES))

    def forward(self, x: Tensor, embedding_VH: Tensor) -> Tensor:
        gain, rows_aH = self.gain.to(x.dtype), embedding_VH[:N_STATES].to(x.dtype)
        return F.linear(x * (gain / EMBEDDING_STD), rows_aH, self.bias.to(x.dtype))


class SigmaEmbedding(nn.Module):
    """Sinusoidal embedding of sigma, followed by a two-layer MLP: (n,) -> (n, C)."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim), nn.SiLU())

    def forward(self, sigma_n: Tensor) -> Tensor:
        half = SINUSOIDS // 2
        frequency = torch.exp(-math.log(BASE) / half * torch.arange(half, device=sigma_n.device))
        angle = torch.outer(sigma_n, frequency)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(next(self.parameters()).dtype))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + eps), times a learned gain, computed in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x)
        return F.rms_norm(wide, self.normalized_shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """Return x as float32 if it has fewer bits, otherwise unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def make_norm(model: dict[str, Any], *, modulated: bool) -> nn.Module:
    """Return the network's kind of norm. LayerNorm has a bias unless adaLN supplies the shift (`modulated`)."""
    eps, width = model.get("norm_eps"), model["hidden_size"]
    if model["norm"] == "rms":
        return RMSNorm(width, eps=RMS_EPS if eps is None else eps)
    return nn.LayerNorm(width, eps=LAYER_EPS if eps is None else eps, bias=not modulated)


def rotary_tables(positions_nL: Tensor, head_dim: int, frequencies: list[float] | None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary encoding's angles, each (n, 1, L, head_dim / 2) float32.

    They are computed at each call, because transformers does not restore buffers that are not in the file of weights.

    Args:
        frequencies: the angle per position of each pair of dimensions, in radians; None for BASE^(-2 j / head_dim).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_nL.device) / head_dim
    frequency = BASE**-exponent if frequencies is None else torch.tensor(frequencies, device=positions_nL.device)
    angle = positions_nL[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys, rotated by their positions. Dimensions j and j + head_dim / 2 form a pair."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def sinusoids(positions_nL: Tensor, width: int) -> Tensor:
    """Return sinusoids of the positions, (n, L, H) float32: sines in even dimensions and cosines in odd dimensions."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=positions_nL.device) / width
    angle = positions_nL.unsqueeze(-1).float() * BASE**-exponent
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(2)


def drop_masked(x_nLH: Tensor, ids_nL: Tensor, read_nL: Tensor) -> Tensor:
    """Return the embeddings with those of <mask> set to zero, and the others of a protein scaled by 0.88 / (1 - r).

    r is the fraction of the protein's tokens, <bos> and <eos> included, that are <mask> (the token dropout of ESM-2).

    Args:
        read_nL: True for tokens, False for padding.
    """
    masked_nL = ids_nL == MASK
    tokens_n, masked_n = read_nL.sum(1), (masked_nL & read_nL).sum(1)
    scale_n = (1 - TRAINED_MASK_RATIO) * tokens_n / (tokens_n - masked_n).clamp(min=1)
    return x_nLH * scale_n.unsqueeze(1).masked_fill(masked_nL, 0).to(x_nLH.dtype).unsqueeze(-1)


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
