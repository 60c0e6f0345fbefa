"""The shape of a model, as read from its checkpoint. Knows OPT's sizes; does not know tensors or files."""

from __future__ import annotations

from dataclasses import dataclass

from metaseq_api.errors import CheckpointMismatch, ParallelSizeError

POSITION_OFFSET = 2
"""Rows 0 and 1 of the position table serve no token: the first token of a text takes row 2 (padding id 1, plus 1)."""
ACTIVATIONS = ("relu", "gelu")
"""gelu in metaseq's sense, the tanh form. Source: metaseq/modules/activation_functions.py:18-20."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything a forward pass needs to know besides the weights. All OPT sizes differ only in these fields.

    `embed_dim` differs from `hidden_dim` in the 350M model alone (projections in and out), which is also the only one
    with `pre_norm` False (layer norm after the residual sum) and `final_norm` False.
    """

    num_layers: int
    hidden_dim: int
    num_heads: int
    ffn_dim: int
    vocab_size: int
    max_positions: int = 2048
    embed_dim: int = 0
    pre_norm: bool = True
    final_norm: bool = True
    activation: str = "relu"
    norm_eps: float = 1e-5
    dtype: str = "fp16"
    tied_output: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        if self.embed_dim == 0:
            object.__setattr__(self, "embed_dim", self.hidden_dim)
        if self.activation not in ACTIVATIONS:
            raise CheckpointMismatch(
                f"this model's activation is {self.activation!r}; OPT models with {' or '.join(ACTIVATIONS)} are served"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_dim // self.num_heads

    @property
    def has_projection(self) -> bool:
        return self.embed_dim != self.hidden_dim

    @property
    def num_params(self) -> int:
        """Parameters of the whole model, a tied output counted once."""
        d, f, e = self.hidden_dim, self.ffn_dim, self.embed_dim
        layer = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
        ends = self.vocab_size * e + (self.max_positions + POSITION_OFFSET) * d
        ends += 2 * d if self.final_norm else 0
        ends += 2 * d * e if self.has_projection else 0
        return self.num_layers * layer + ends

    def check_parallel(self, size: int, flag: str = "--model-parallel") -> None:
        """Raises: ParallelSizeError where heads, ffn or vocabulary do not divide by `size`, naming sizes that do."""
        parts = {"attention heads": self.num_heads, "ffn rows": self.ffn_dim, "vocabulary rows": self.vocab_size}
        bad = [f"{n} {what}" for what, n in parts.items() if size < 1 or n % size]
        if bad:
            good = [s for s in range(1, self.num_heads + 1) if all(n % s == 0 for n in parts.values())]
            raise ParallelSizeError(
                f"{flag} {size} does not divide this model's {' and '.join(bad)}; it can be {', '.join(map(str, good))}"
            )


def _shape(layers: int, width: int, heads: int) -> ModelConfig:
    return ModelConfig(num_layers=layers, hidden_dim=width, num_heads=heads, ffn_dim=4 * width, vocab_size=50272)


OPT_SHAPES: dict[str, ModelConfig] = {
    "opt-125m": _shape(12, 768, 12),
    "opt-350m": ModelConfig(
        num_layers=24,
        hidden_dim=1024,
        num_heads=16,
        ffn_dim=4096,
        vocab_size=50272,
        embed_dim=512,
        pre_norm=False,
        final_norm=False,
    ),
    "opt-1.3b": _shape(24, 2048, 32),
    "opt-2.7b": _shape(32, 2560, 32),
    "opt-6.7b": _shape(32, 4096, 32),
    "opt-13b": _shape(40, 5120, 40),
    "opt-30b": _shape(48, 7168, 56),
    "opt-66b": _shape(64, 9216, 72),
    "opt-175b": _shape(96, 12288, 96),
}
"""Published shapes. Source: metaseq/launcher/opt_job_constants.py:32-45; OPT-IML has those of OPT."""


def heads_from_shape(num_layers: int, hidden_dim: int) -> int | None:
    """The head count of the published model with this many layers of this width, or None; weights do not tell it."""
    for config in OPT_SHAPES.values():
        if (config.num_layers, config.hidden_dim) == (num_layers, hidden_dim):
            return config.num_heads
    return None


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a whole model by metaseq's name, q, k and v apart.

    Source: metaseq/models/transformer_decoder.py:88-191.
    """
    d, f, e = config.hidden_dim, config.ffn_dim, config.embed_dim
    shapes: dict[str, tuple[int, ...]] = {
        "decoder.embed_tokens.weight": (config.vocab_size, e),
        "decoder.embed_positions.weight": (config.max_positions + POSITION_OFFSET, d),
    }
    if not config.tied_output:
        shapes["decoder.output_projection.weight"] = (config.vocab_size, e)
    if config.has_projection:
        shapes |= {"decoder.project_in_dim.weight": (d, e), "decoder.project_out_dim.weight": (e, d)}
    matrices = {f"self_attn.{x}_proj": (d, d) for x in ("q", "k", "v", "out")} | {"fc1": (f, d), "fc2": (d, f)}
    for i in range(config.num_layers):
        prefix = f"decoder.layers.{i}"
        for name, shape in matrices.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            if config.bias:
                shapes[f"{prefix}.{name}.bias"] = shape[:1]
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{prefix}.{name}.{leaf}": (d,) for leaf in ("weight", "bias")}
    if config.final_norm:
        shapes |= {f"decoder.layer_norm.{leaf}": (d,) for leaf in ("weight", "bias")}
    return shapes
