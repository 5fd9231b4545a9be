"""A model's architecture as data: its matrices with their formats, what its tokens see, and how many numbers it has.

Nothing of a step is computed here; analysis/model_config.py makes it from a config.json, analysis/operations.py counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from .formats import BF16, FP8_DS_MLA, Format, Quantisation


class Split(StrEnum):
    """Which side of a matrix a tensor-parallel group shares (Shoeybi et al., Megatron-LM, 2019, section 3)."""

    OUTPUTS = "outputs"
    INPUTS = "inputs"
    NONE = "none"


@dataclass(frozen=True)
class Linear:
    """A matrix that activations are multiplied with: for each token 2 x inputs x outputs operations."""

    name: str  # of its module within the layer
    inputs: int
    outputs: int
    format: Format
    bias: bool = False
    split: Split = Split.NONE
    units: int = 1  # of the side that is split: heads, or single rows; a rank has whole ones

    @property
    def parameters(self) -> int:
        """Numbers in the matrix and its bias."""
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)

    def part(self, ranks: int) -> tuple[int, int]:
        """(outputs, inputs) of the rank with the largest part; a unit that cannot be split is on several ranks."""
        units = max(self.units, 1)
        share = -(-units // ranks) / units
        outputs = self.outputs * share if self.split is Split.OUTPUTS else self.outputs
        inputs = self.inputs * share if self.split is Split.INPUTS else self.inputs
        return round(outputs), round(inputs)


@dataclass(frozen=True)
class Attention:
    """Softmax attention (grouped heads: Ainslie et al., GQA, 2023). `window`: how many tokens a token sees."""

    heads: int
    kv_heads: int
    head_dim: int  # of queries and keys
    value_dim: int
    window: int | None = None  # the last that many, itself included
    chunked: bool = False  # the window is the token's own chunk of that many (Llama 4), not the last ones
    projections: tuple[Linear, ...] = ()
    vectors: int = 0  # numbers in norms and sinks


@dataclass(frozen=True)
class Indexer:
    """Chooses the `top` tokens that sparse attention sees (DeepSeek-V3.2-Exp, 2025, section 2)."""

    heads: int
    dim: int
    top: int
    projections: tuple[Linear, ...] = ()
    vectors: int = 0


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: keys and values from one latent of a token (DeepSeek-V2, 2024, section 2.1)."""

    heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    latent: int  # kv_lora_rank: the cache holds latent + rope_dim numbers a token
    projections: tuple[Linear, ...] = ()
    expansion: Linear | None = None  # kv_b_proj, from the latent to keys and values of all heads
    vectors: int = 0
    indexer: Indexer | None = None


@dataclass(frozen=True)
class Recurrent:
    """Linear attention or a state space: a state of fixed size for each request instead of a cache that grows.

    `products` multiply-adds for each number of the state and token: the gated delta rule reads the state with the key,
    writes a rank-one update and reads it with the query (Yang et al., Gated Delta Networks, 2024, equation 10): 3; a
    selective state space writes and reads (Gu and Dao, Mamba, 2023, equation 2): 2.
    """

    kind: str  # linear or mamba: the kinds of stage `attention`
    units: int  # heads, or channels: what the ranks share
    state: int  # numbers of state of one unit
    products: int
    kernel: int  # of the convolution before it
    channels: int  # of the convolution
    projections: tuple[Linear, ...] = ()
    vectors: int = 0
    state_format: Format | None = None  # None: as the activations


@dataclass(frozen=True)
class Dense:
    """A feed-forward block that every token passes."""

    matrices: tuple[Linear, ...]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts; `shared` are the matrices of the experts that every token passes."""

    count: int
    per_token: int
    matrices: tuple[Linear, ...]  # of one expert
    router: Linear | None
    shared: tuple[Linear, ...] = ()
    latent: tuple[Linear, ...] = ()  # projections around the routed experts, where these are narrower than the model
    vectors: int = 0
    width: int = 0  # of what is sent to an expert and comes back


Mixer = Attention | LatentAttention | Recurrent


@dataclass(frozen=True)
class Layer:
    """One layer; equal layers are equal objects. Parts that are not understood are absent."""

    mixers: tuple[Mixer, ...] = ()
    feed_forward: Dense | Experts | None = None
    vectors: int = 0  # numbers in the norms


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has. `active`: those that are multiplied with one token, without the input embedding."""

    total: int  # multi-token prediction layers not counted
    active: int
    embedding: int  # input embedding; with tied embeddings it is the output projection too
    head: int  # output projection; 0 when it is tied
    draft: int  # multi-token prediction layers


@dataclass(frozen=True)
class Model:
    """An architecture. Sizes that the config does not tell are None, and what follows from them is absent."""

    kind: str  # model_type
    hidden: int | None
    vocabulary: int | None
    layers: tuple[Layer, ...]
    activations: Format
    kv_cache: Format
    head: Linear | None  # output projection, also when it is tied
    tied: bool
    vectors: int = 0  # the last norm
    draft_layers: tuple[Layer, ...] = ()  # multi-token prediction
    draft_projection: Linear | None = None  # of one such layer: from its two inputs to its width
    draft_vectors: int = 0  # norms of one such layer besides those of its block
    quantisation: Quantisation = field(default_factory=Quantisation)
    not_understood: tuple[str, ...] = ()

    def parameters(self) -> Parameters:
        """Counts the parameters of what was understood."""
        embedding = (self.hidden or 0) * (self.vocabulary or 0)
        head = self.head.parameters if self.head else 0
        bodies = [_counts(layer) for layer in self.layers]
        own_head = (head - embedding if self.head and self.head.bias else 0) if self.tied else head
        draft = sum(_counts(layer)[0] + self.draft_vectors for layer in self.draft_layers)
        draft += len(self.draft_layers) * (self.draft_projection.parameters if self.draft_projection else 0)
        return Parameters(
            total=sum(total for total, _ in bodies) + self.vectors + embedding + own_head,
            active=sum(active for _, active in bodies) + self.vectors + head,
            embedding=embedding,
            head=own_head,
            draft=draft,
        )

    def kv_bytes_per_token(self) -> float:
        """Bytes that one token adds to the KV cache over all layers, on one rank that holds all heads.

        For attention with a window: while the context is within it. Recurrent layers add none.
        """
        return sum(cache_entry(mixer, self.kv_cache) for layer in self.layers for mixer in layer.mixers)


def cache_entry(mixer: Mixer, form: Format, ranks: int = 1) -> float:
    """Bytes of one token in a layer's cache, scales included, on one of the ranks that share its heads."""
    if isinstance(mixer, Attention):
        return -(-mixer.kv_heads // ranks) * (form.bytes(1, mixer.head_dim) + form.bytes(1, mixer.value_dim))
    if isinstance(mixer, LatentAttention):  # every rank holds the latent
        return form.bytes(1, mixer.latent) + (BF16 if form is FP8_DS_MLA else form).bytes(1, mixer.rope_dim)
    return 0.0


def _counts(layer: Layer) -> tuple[int, int]:
    """(all parameters, active parameters) of a layer."""
    total = layer.vectors
    for mixer in layer.mixers:
        total += mixer.vectors + sum(each.parameters for each in mixer.projections)
        if isinstance(mixer, LatentAttention):
            total += mixer.expansion.parameters if mixer.expansion else 0
            if mixer.indexer:
                total += mixer.indexer.vectors + sum(each.parameters for each in mixer.indexer.projections)
    block = layer.feed_forward
    if isinstance(block, Dense):
        total += sum(each.parameters for each in block.matrices)
    if not isinstance(block, Experts):
        return total, total
    total += block.vectors + sum(each.parameters for each in (*block.shared, *block.latent))
    total += block.router.parameters if block.router else 0
    expert = sum(each.parameters for each in block.matrices)
    return total + block.count * expert, total + min(block.per_token, block.count) * expert
