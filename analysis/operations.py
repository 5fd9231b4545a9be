"""Operations and bytes of a step, by stage: from the model's description, the step's sums and the sharding. Pure.

Conventions, which docs/speed-of-light.md shows (CONVENTIONS):
an operation is a multiplication or an addition in a matrix product, a convolution or a recurrence; only what the result
needs is counted (causal attention: what a token sees). Weights are read once a step, the cache once a request.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from .architecture import Attention, Dense, Experts, Indexer, LatentAttention, Linear, Recurrent, cache_entry
from .batch import Batch, Bound, Numbers, Sums
from .sharding import Collective, Exchange, Sharding, distinct_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .architecture import Layer, Mixer, Model
    from .formats import Format

# What is counted and how, a line each: the page docs/speed-of-light.md prints them.
CONVENTIONS: tuple[tuple[str, str], ...] = (
    (
        "operations",
        "multiplications and additions, two for each multiply-accumulate, of matrix products, convolutions and"
        " recurrences, as torch's FlopCounterMode counts them; norms, activation functions, softmax, rotary embeddings,"
        " sampling and padding are not counted",
    ),
    (
        "matrix products",
        "2 x inputs x outputs for each token; they are computed in the arithmetic that the weights' format names:"
        " weights without quantised activations are multiplied as the activations are",
    ),
    (
        "attention",
        "2 x heads x (width of keys + width of values) for each pair of a token and one that it sees, in the"
        " activations' arithmetic whatever the cache's format. Causal: a request with q tokens in the step and kv after"
        " it has q kv - q (q - 1) / 2 pairs, which the step's sums give exactly",
    ),
    (
        "windows",
        "a token sees the last w tokens, itself included. Sums give this exactly for one request and where no context"
        " exceeds w; else the expected value takes all requests of the phase for alike, within bounds that hold for any"
        " requests with these sums",
    ),
    (
        "latent attention",
        "prefill expands the latents of the whole context to keys and values of every head; decode works on the latents"
        " (absorbed), as does sparse attention in both phases. So does vLLM; SGLang where its attention backend takes"
        " one of the MHA methods for prefill, else absorbed there too. The cache is read as latents either way,"
        " and absorbed weights are not quantised",
    ),
    (
        "recurrences",
        "counted as the recurrence itself, token by token: gated delta rule 6, state space 4 operations for each number"
        " of the state. Kernels that compute prefill in chunks do more, for the sake of matrix units: that is theirs",
    ),
    (
        "experts touched",
        "as recorded, of n data-parallel ranks with r each E (1 - (1 - r/E)^n); else E (1 - (1 - k/E)^T) of E experts"
        " for T tokens with k each, every choice as likely as any other and independent of other tokens. Skewed routing"
        " touches fewer, so that this is the most on average",
    ),
    ("logits", "for the last token of every prefill chunk and every decode token, draft tokens included"),
    (
        "weight bytes",
        "all weights of the layers and the output projection once a step, scales, norms and biases included; of experts"
        " those that are touched; of the embedding one row a token",
    ),
    (
        "cache bytes",
        "keys and values (or latents) that a request's tokens see are read once a step, those of its own tokens are"
        " written and read, with the scales of the cache's format; a recurrent state is read and written once a"
        " request. Contexts that requests share are read once for each",
    ),
    (
        "activation bytes",
        "each matrix product reads its inputs and writes its outputs once, matrices side by side that share their"
        " input read it once; all else is taken for fused. They are kept apart, as they need not leave the caches",
    ),
    (
        "tensor parallel",
        "a rank has whole heads: figures are those of the rank with the most; key and value heads that are fewer than"
        " the ranks are on several, latents, routers and norms on all",
    ),
    (
        "pipeline parallel",
        "each stage has its layers, the first the embedding, the last the logits; a session's figures are means over"
        " the stages, which work at the same time on several steps",
    ),
    (
        "expert parallel",
        "every rank's experts get the same number of tokens, and all data-parallel ranks have a step like this one:"
        " imbalance is what is measured against it",
    ),
    (
        "collectives",
        "bytes as nccl-tests counts them, in the activations' dtype; tensor parallel: one all_reduce after each mixer"
        " and each feed-forward block, one after the embedding, an all_gather of the logits",
    ),
    (
        "multi-token prediction",
        "in stage draft, only when draft tokens are asked for: the first pass over the step's tokens, further ones over"
        " one token a request, each with the output projection for every request",
    ),
    ("left out", "LoRA adapters, encoders of images and sound, and what the description says it does not understand"),
)


@dataclass(frozen=True)
class Formula:
    """A line of the table of formulas: what a part of a step takes."""

    stage: str
    part: str
    operations: str
    moved: str  # bytes
    source: str


_DERIVED = "derived here"
_GPT = "Kaplan et al., Scaling Laws for Neural Language Models, 2020, table 1: 2 a parameter and token"
FORMULAS: tuple[Formula, ...] = (
    Formula("embed", "embedding", "0", "one row a token", _DERIVED),
    Formula("forward", "projections around attention", "2 T in out, each matrix", "each matrix once", _GPT),
    Formula("forward", "norms", "0 (not counted)", "each number once", _DERIVED),
    Formula(
        "attention",
        "full attention",
        "2 heads (d of keys + d of values) S(q kv - q (q - 1) / 2)",
        "S(kv) + S(q) entries of kv heads (d of keys + d of values)",
        "Sums.positions; Dao et al., FlashAttention, 2022: no other traffic is needed",
    ),
    Formula(
        "attention",
        "sliding attention",
        "2 heads (d of keys + d of values) S(sum over j = 1..q of min(kv - q + j, window))",
        "S(min(kv, window + q - 1)) + S(q) entries",
        "Beltagy et al., Longformer, 2020, section 3.1; bounds: Sums.windowed_positions",
    ),
    Formula(
        "attention",
        "chunked attention",
        "2 heads (d of keys + d of values) S(sum over the q tokens of their places in their chunk)",
        "S(min(kv, chunk + q - 1)) + S(q) entries: at most",
        "Llama 4: transformers, chunked_attention layers; bounds: Sums.chunked_positions",
    ),
    Formula(
        "attention",
        "latent attention",
        "expanded: 2 heads (nope + rope + value) pairs; absorbed: 2 heads (2 latent + rope) pairs",
        "S(kv) + S(q) entries of latent + rope",
        "DeepSeek-V2, 2024, section 2.1.2, equations 9 to 19",
    ),
    Formula(
        "attention",
        "latent expansion",
        "expanded: 2 latent heads (nope + value) S(kv); absorbed, into queries and outputs: the same of T",
        "the weights once; absorbed they are a copy that is not quantised",
        "DeepSeek-V2, 2024, section 2.1.2; vLLM and SGLang keep W_UK and W_UV in the activations' dtype",
    ),
    Formula(
        "attention",
        "indexer",
        "2 heads (d + 1) pairs; attention then sees the top k alone",
        "S(kv) + S(q) entries of d bytes and scales",
        "DeepSeek-V3.2-Exp, 2025, section 2, equation 1",
    ),
    Formula(
        "attention",
        "linear recurrence",
        "6 heads (d of keys) (d of values) T + 2 channels kernel T",
        "the state twice a request",
        "Yang et al., Gated Delta Networks, 2024, equation 10",
    ),
    Formula(
        "attention",
        "mamba recurrence",
        "4 channels state T + 2 channels kernel T",
        "the state twice a request",
        "Gu and Dao, Mamba, 2023, equation 2; Dao and Gu, Mamba-2, 2024, equation 1",
    ),
    Formula("mlp", "mlp", "2 T in out, each matrix", "each matrix once", _GPT),
    Formula("moe_route", "router", "2 T hidden experts", "the matrix once", _DERIVED),
    Formula(
        "expert_compute",
        "experts",
        "2 k T in out, each matrix of an expert",
        "the matrices of the experts that are touched: E (1 - (1 - k / E)^T) of E on average",
        "distinct_experts: each token misses an expert with probability 1 - k / E",
    ),
    Formula("forward", "projections around experts", "2 T in out, each matrix", "each matrix once", _DERIVED),
    Formula("shared_experts", "shared experts", "2 T in out, each matrix", "each matrix once", _DERIVED),
    Formula("logits", "logits", "2 R hidden vocabulary", "the matrix once", _GPT),
    Formula(
        "draft",
        "multi-token prediction",
        "projection, block and logits, each pass",
        "the same",
        "DeepSeek-V3, 2024, section 2.2",
    ),
    Formula(
        "collective",
        "tensor parallel",
        "0",
        "all_reduce of T hidden, twice a layer",
        "Shoeybi et al., Megatron-LM, 2019, section 3",
    ),
    Formula(
        "expert_dispatch",
        "exchange of tokens",
        "0",
        "all_gather of all ranks' tokens, or all_to_all: a token to n (1 - C(E - E / n, k) / C(E, k)) of n ranks",
        "distinct_ranks: k different experts, each choice as likely; DeepEP sends a token to a rank once",
    ),
    Formula("expert_combine", "exchange of results", "0", "reduce_scatter, or all_to_all, of as much", "the same"),
)


class Latent(StrEnum):
    """The form in which latent attention is computed (DeepSeek-V2, 2024, section 2.1.2)."""

    EXPANDED = "expanded"  # keys and values of every head from the latents of the whole context
    ABSORBED = "absorbed"  # queries and results go through the expansion's weights, attention is over the latents


@dataclass(frozen=True, eq=False)
class Work:
    """What a part of a step takes on one rank, in one arithmetic. Numbers are for the whole step."""

    stage: str  # of the vocabulary: where its time is; forward: in no stage of the layer level
    part: str
    arithmetic: str  # of the products: a key of hardware.Device.peaks
    operations: Numbers
    weights: Numbers  # bytes read
    cache_read: Numbers  # bytes
    cache_written: Numbers  # bytes
    activations: Numbers  # bytes read and written, if nothing of them stays in a cache

    @property
    def bytes(self) -> Numbers:
        """Bytes that have to come from memory or go there: activations are not among them."""
        return self.weights + self.cache_read + self.cache_written

    def plus(self, other: Work) -> Work:
        """Both together, under this one's names."""
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in _QUANTITIES})

    def times(self, count: int) -> Work:
        """The same `count` times."""
        return replace(self, **{name: getattr(self, name) * float(count) for name in _QUANTITIES})


_QUANTITIES = ("operations", "weights", "cache_read", "cache_written", "activations")


@dataclass(frozen=True, eq=False)
class StepWork:
    """What steps take on one rank."""

    works: tuple[Work, ...]
    collectives: tuple[Collective, ...]
    assumptions: tuple[str, ...]  # that these numbers rest on, and what they leave out

    def stages(self) -> list[str]:
        """The stages that have work or communication."""
        return list(dict.fromkeys([each.stage for each in self.works] + [each.stage for each in self.collectives]))

    def of(self, stage: str | None = None) -> list[Work]:
        """The work of a stage; of all without one."""
        return [each for each in self.works if stage in (None, each.stage)]

    def operations(self, stage: str | None = None) -> Numbers:
        """Operations of a stage, or of all, in whatever arithmetic."""
        return _total(each.operations for each in self.of(stage))

    def operations_by_arithmetic(self, stage: str | None = None) -> dict[str, Numbers]:
        """Operations of a stage, or of all, apart by arithmetic: each has a peak of its own."""
        names = dict.fromkeys(each.arithmetic for each in self.of(stage))
        return {name: _total(w.operations for w in self.of(stage) if w.arithmetic == name) for name in names}

    def bytes(self, stage: str | None = None, *, activations: bool = False) -> Numbers:
        """Bytes of weights and cache of a stage, or of all; with `activations` theirs too."""
        return _total(each.bytes + each.activations * float(activations) for each in self.of(stage))

    def bus_bytes(self, stage: str | None = None) -> Numbers:
        """Bytes of collectives on the busiest link, one direction."""
        return _total(each.bus_bytes for each in self.collectives if stage in (None, each.stage))


def _total(values: Iterable[Numbers]) -> Numbers:
    return sum(values, start=np.asarray(0.0))


def step_work(
    model: Model,
    batch: Batch,
    sharding: Sharding | None = None,
    *,
    stage: int = 0,
    bound: Bound = Bound.EXPECTED,
    draft_tokens: int = 0,
    prefill_form: Latent = Latent.EXPANDED,
    decode_form: Latent = Latent.ABSORBED,
) -> StepWork:
    """Operations and bytes of the steps in `batch`, on the busiest rank of pipeline stage `stage`.

    `draft_tokens`: how many tokens the model's multi-token prediction layers propose for each request after the step.
    The forms are of latent attention. Raises ValueError for a pipeline stage that is not there.
    """
    counting = _Counting(model, batch, sharding or Sharding(), bound, prefill_form, decode_form)
    works, collectives = counting.forward(stage)
    if draft_tokens > 0 and model.draft_layers and stage == counting.ranks.pipeline - 1:
        works += counting.draft(draft_tokens)
    return StepWork(tuple(_merged(works)), tuple(collectives), tuple(counting.assumptions()))


def distinct_experts(count: int, per_token: int, tokens: Numbers, bound: Bound = Bound.EXPECTED) -> Numbers:
    """How many of `count` experts `tokens` tokens choose, `per_token` different ones each.

    Expected: each token misses an expert with probability 1 - k/E, independently. By Jensen's inequality no other
    routing with independent tokens touches more on average.
    """
    if bound is Bound.LEAST:
        return np.minimum(tokens, 1.0) * min(per_token, count)
    if bound is Bound.MOST:
        return np.minimum(float(count), tokens * per_token)
    return count * (1 - (1 - min(per_token, count) / count) ** tokens)


def _merged(works: Sequence[Work]) -> Iterator[Work]:
    """One entry for each part and arithmetic, in the order in which they come first, without those that are nothing."""
    found: dict[tuple[str, str, str], Work] = {}
    for each in works:
        key = (each.stage, each.part, each.arithmetic)
        found[key] = found[key].plus(each) if key in found else each
    for each in found.values():
        if any(np.any(getattr(each, name)) for name in _QUANTITIES):
            yield each


class _Counting:
    """One evaluation: what all its parts share."""

    def __init__(
        self, model: Model, batch: Batch, ranks: Sharding, bound: Bound, prefill_form: Latent, decode_form: Latent
    ):
        self.model = model
        self.batch = batch
        self.ranks = ranks
        self.bound = bound
        self.forms = {"prefill": prefill_form, "decode": decode_form}
        self.plain = model.activations
        self.width = model.activations.element_bytes
        self.tokens = batch.tokens
        self.any = np.minimum(self.tokens, 1.0)  # a step without tokens reads nothing
        self.none = self.tokens * 0.0

    def forward(self, stage: int) -> tuple[list[Work], list[Collective]]:
        first, end = self.ranks.layers(len(self.model.layers), stage)
        layers = Counter(self.model.layers[first:end])
        works: list[Work] = []
        collectives: list[Collective] = []
        if stage == 0:
            works += self.embedding()
        for layer, count in layers.items():
            works += [each.times(count) for each in self.layer(layer)]
        last = stage == self.ranks.pipeline - 1
        if last:
            works += self.logits(self.batch.logits, "logits", "logits")
            works.append(self.work("forward", "norms", weights=self.model.vectors * self.width))
        if self.model.hidden:
            collectives = list(self.collectives(layers, self.model.hidden, first=stage == 0, last=last))
        return works, collectives

    # Pieces

    def work(
        self,
        stage: str,
        part: str,
        arithmetic: Format | None = None,
        *,
        operations: Numbers | float = 0.0,
        weights: Numbers | float = 0.0,
        read: Numbers | float = 0.0,
        written: Numbers | float = 0.0,
        activations: Numbers | float = 0.0,
    ) -> Work:
        """Work of this step; weights are not read by a step without tokens."""
        return Work(
            stage,
            part,
            (arithmetic or self.plain).arithmetic,
            self.none + operations,
            self.any * weights,
            self.none + read,
            self.none + written,
            self.none + activations,
        )

    def matrices(
        self,
        stage: str,
        part: str,
        chain: Sequence[Linear],
        rows: Numbers,
        ranks: int,
        copies: Numbers | float = 1.0,
    ) -> Iterator[Work]:
        """Products of `rows` tokens with matrices; their weights are read `copies` times (experts touched)."""
        before: Linear | None = None
        for each in chain:
            outputs, inputs = each.part(ranks)
            shared = before is not None and (before.inputs, before.split) == (each.inputs, each.split)
            yield self.work(
                stage,
                part,
                each.format,
                operations=2.0 * inputs * outputs * rows,
                weights=(each.format.bytes(outputs, inputs) + (outputs * self.width if each.bias else 0)) * copies,
                activations=rows * ((0 if shared else inputs) + outputs) * self.width,
            )
            before = each

    def embedding(self) -> list[Work]:
        """One row a token; of a shared vocabulary the rank has its part of them."""
        row = (self.model.hidden or 0) * self.width if self.model.vocabulary else 0.0
        rows = self.tokens / self.ranks.tensor
        # Not weights= : the rows read follow the tokens.
        return [replace(self.work("embed", "embedding", activations=self.tokens * row), weights=rows * row)]

    def logits(self, rows: Numbers, stage: str, part: str) -> list[Work]:
        head = self.model.head
        return list(self.matrices(stage, part, [head], rows, self.ranks.tensor)) if head else []

    # Layers

    def layer(self, layer: Layer) -> list[Work]:
        works = [self.work("forward", "norms", weights=layer.vectors * self.width)]
        for mixer in layer.mixers:
            works += self.mixer(mixer)
        block = layer.feed_forward
        if isinstance(block, Dense):
            works += self.matrices("mlp", "mlp", block.matrices, self.tokens, self.ranks.tensor)
        elif isinstance(block, Experts):
            works += self.experts(block)
        return works

    def mixer(self, mixer: Mixer) -> Iterator[Work]:
        ranks = self.ranks.tensor
        yield from self.matrices("forward", "projections around attention", mixer.projections, self.tokens, ranks)
        yield self.work("forward", "norms", weights=mixer.vectors * self.width)
        for phase, sums in (("prefill", self.batch.prefill), ("decode", self.batch.decode)):
            if isinstance(mixer, Attention):
                yield self.attention(mixer, phase, sums)
            elif isinstance(mixer, LatentAttention):
                yield from self.latent_attention(mixer, phase, sums)
            else:
                yield self.recurrent(mixer, phase, sums)
        if isinstance(mixer, LatentAttention) and mixer.expansion:
            yield self.expansion_weights(mixer, mixer.expansion)

    def form(self, mixer: LatentAttention, phase: str) -> Latent:
        return Latent.ABSORBED if mixer.indexer else self.forms[phase]

    def expansion_weights(self, mixer: LatentAttention, expansion: Linear) -> Work:
        """Read once for both phases; absorbed, vLLM and SGLang keep a copy that is not quantised, which is read too."""
        outputs, inputs = expansion.part(self.ranks.tensor)
        phases = {"prefill": self.batch.prefill.tokens, "decode": self.batch.decode.tokens}
        tokens = {form: _total(n for phase, n in phases.items() if self.form(mixer, phase) is form) for form in Latent}
        expanded, absorbed = (np.minimum(tokens[form], 1.0) for form in (Latent.EXPANDED, Latent.ABSORBED))
        if expansion.format == self.plain:
            absorbed = np.maximum(absorbed - expanded, 0.0)
        size = expanded * expansion.format.bytes(outputs, inputs) + absorbed * self.plain.bytes(outputs, inputs)
        return replace(self.work("attention", "latent expansion, weights"), weights=self.none + size)

    def attention(self, mixer: Attention, phase: str, sums: Sums) -> Work:
        heads = -(-mixer.heads // self.ranks.tensor)
        kind = "sliding" if mixer.window else "full"
        positions, context = sums.positions(), sums.context
        if mixer.window and mixer.chunked:
            kind = "chunked"
            positions = sums.chunked_positions(mixer.window, self.bound)
            context = sums.windowed_context(mixer.window, self.bound)
        elif mixer.window:
            positions = sums.windowed_positions(mixer.window, self.bound)
            context = sums.windowed_context(mixer.window, self.bound)
        entry = cache_entry(mixer, self.model.kv_cache, self.ranks.tensor)
        return self.work(
            "attention",
            f"{kind} attention, {phase}",
            operations=2.0 * heads * (mixer.head_dim + mixer.value_dim) * positions,
            read=context * entry,
            written=sums.tokens * entry,
            activations=sums.tokens * heads * (mixer.head_dim + mixer.value_dim) * self.width,
        )

    def latent_attention(self, mixer: LatentAttention, phase: str, sums: Sums) -> Iterator[Work]:
        """Expanded: the expansion of the context, then keys of nope + rope and values. Absorbed: as many operations a
        token as the expansion has, then keys of latent + rope and values of latent numbers.
        """
        heads = -(-mixer.heads // self.ranks.tensor)
        entry = cache_entry(mixer, self.model.kv_cache)
        positions, context = sums.positions(), sums.context
        if mixer.indexer:
            yield from self.indexer(mixer.indexer, phase, sums)
            positions = sums.windowed_positions(mixer.indexer.top, self.bound)
            context = sums.chosen_context(mixer.indexer.top)
        expanded = self.form(mixer, phase) is Latent.EXPANDED
        keys = (mixer.nope_dim if expanded else mixer.latent) + mixer.rope_dim
        values = mixer.value_dim if expanded else mixer.latent
        moved = mixer.nope_dim + mixer.value_dim
        rows = context if expanded else sums.tokens
        yield self.work(
            "attention",
            f"latent expansion, {phase}",
            mixer.expansion.format if mixer.expansion and expanded else None,
            operations=2.0 * mixer.latent * heads * moved * rows,
            activations=rows * (mixer.latent + heads * moved) * self.width,
        )
        read = context * heads * (moved + mixer.rope_dim) * self.width if expanded else 0.0
        yield self.work(
            "attention",
            f"latent attention, {phase}",
            operations=2.0 * heads * (keys + values) * positions,
            read=context * entry,
            written=sums.tokens * entry,
            activations=sums.tokens * heads * (keys + values) * self.width + read,
        )

    def indexer(self, indexer: Indexer, phase: str, sums: Sums) -> Iterator[Work]:
        """Scores of every token that is seen, on every rank: 2 x heads x dim operations each, 2 x heads to add them up.

        Its cache is vLLM's: fp8 with a 32-bit scale for 128 numbers.
        """
        part = f"indexer, {phase}"
        yield from self.matrices("forward", "projections around attention", indexer.projections, sums.tokens, 1, 0.0)
        if phase == "prefill":
            weights = sum(each.format.bytes(each.outputs, each.inputs) for each in indexer.projections)
            yield self.work("forward", "projections around attention", weights=weights)
            yield self.work("forward", "norms", weights=indexer.vectors * self.width)
        entry = index_bytes(indexer)
        yield self.work(
            "attention",
            part,
            operations=2.0 * indexer.heads * (indexer.dim + 1) * sums.positions(),
            read=sums.context * entry,
            written=sums.tokens * entry,
        )

    def recurrent(self, mixer: Recurrent, phase: str, sums: Sums) -> Work:
        ranks = self.ranks.tensor
        units, channels = -(-mixer.units // ranks), -(-mixer.channels // ranks)
        form = mixer.state_format or self.plain
        state = units * mixer.state * form.element_bytes + channels * (mixer.kernel - 1) * self.width
        return self.work(
            "attention",
            f"{mixer.kind} recurrence, {phase}",
            operations=2.0 * (mixer.products * units * mixer.state + channels * mixer.kernel) * sums.tokens,
            read=sums.requests * state,
            written=sums.requests * state,
            activations=2.0 * sums.tokens * channels * self.width,
        )

    def experts(self, block: Experts) -> Iterator[Work]:
        ranks = self.ranks
        group = self.tokens * float(ranks.data)
        if block.router:
            yield from self.matrices("moe_route", "router", [block.router], self.tokens, 1)
        yield self.work("moe_route", "router", weights=block.vectors * self.width)
        yield from self.matrices("forward", "projections around experts", block.latent, self.tokens, 1)
        touched = distinct_experts(block.count, block.per_token, group, self.bound)
        if (recorded := self.batch.distinct_experts) is not None:
            # By this data-parallel rank's tokens: the others' choices are alike, and independent of them.
            missed = 1 - np.minimum(recorded, float(block.count)) / block.count
            touched = np.where(np.isnan(recorded), touched, block.count * (1 - missed**ranks.data))
        rows = group * block.per_token / ranks.expert
        held = np.minimum(touched, float(block.count)) / ranks.expert
        yield from self.matrices("expert_compute", "experts", block.matrices, rows, ranks.expert_tensor, held)
        yield from self.matrices("shared_experts", "shared experts", block.shared, self.tokens, ranks.tensor)

    # Multi-token prediction

    def draft(self, count: int) -> list[Work]:
        """DeepSeek-V3, 2024, section 2.2; vLLM proposes further tokens with the same layers, one token a request."""
        batch = replace(self.batch, distinct_experts=None)  # what is recorded is the main model's
        works = self.on(batch).draft_pass()
        for number in range(1, count):
            requests = batch.requests
            context = batch.prefill.context + batch.decode.context + requests * number
            decode = Sums(requests, requests, context, requests, context)
            works += self.on(Batch(Sums(*[self.none] * 5), decode)).draft_pass()
        return works

    def on(self, batch: Batch) -> _Counting:
        """The same for another batch."""
        return _Counting(self.model, batch, self.ranks, self.bound, self.forms["prefill"], self.forms["decode"])

    def draft_pass(self) -> list[Work]:
        model = self.model
        works: list[Work] = []
        for layer in model.draft_layers:
            if model.draft_projection:
                works += self.matrices("draft", "draft", [model.draft_projection], self.tokens, 1)
            works.append(self.work("draft", "draft", weights=model.draft_vectors * self.width))
            works += self.layer(layer)
            works += self.logits(self.batch.requests, "draft", "draft")
            works += self.embedding()
        return [
            replace(each, stage="draft", part=each.part if each.part == "draft" else f"draft: {each.part}")
            for each in works
        ]

    # Communication

    def collectives(self, layers: Counter[Layer], hidden: int, *, first: bool, last: bool) -> Iterator[Collective]:
        ranks, row = self.ranks, hidden * self.width
        reduced = self.tokens * row
        if ranks.tensor > 1:
            if first and self.model.vocabulary:
                yield Collective("collective", "embedding", "all_reduce", ranks.tensor, reduced, 1)
            mixers = sum(count for layer, count in layers.items() if layer.mixers)
            blocks = sum(count for layer, count in layers.items() if layer.feed_forward)
            if mixers:
                yield Collective("collective", "attention", "all_reduce", ranks.tensor, reduced, mixers)
            if blocks:
                yield Collective("collective", "feed-forward", "all_reduce", ranks.tensor, reduced, blocks)
            if last and self.model.vocabulary:
                size = self.batch.logits * self.model.vocabulary * self.width
                yield Collective("collective", "logits", "all_gather", ranks.tensor, size, 1)
        if ranks.data > 1:
            yield from self.exchanges(layers)
        if not last:  # the hidden state and the residual
            yield Collective("collective", "pipeline", "send", 2, 2 * reduced, 1)

    def exchanges(self, layers: Counter[Layer]) -> Iterator[Collective]:
        """Tokens to the experts of other data-parallel ranks and back."""
        ranks = self.ranks
        for block, count in _blocks(layers).items():
            row = block.width * self.width
            if ranks.exchange is Exchange.ALL_TO_ALL and ranks.expert > 1:
                copies = distinct_ranks(block.count, block.per_token, ranks.expert)
                size = self.tokens / ranks.tensor * copies * row
                for stage, part in (("expert_dispatch", "dispatch"), ("expert_combine", "combine")):
                    yield Collective(stage, part, "all_to_all", ranks.expert, size, count)
            else:
                size = self.tokens * float(ranks.data) * row
                yield Collective("expert_dispatch", "dispatch", "all_gather", ranks.data, size, count)
                yield Collective("expert_combine", "combine", "reduce_scatter", ranks.data, size, count)

    # What is assumed

    def assumptions(self) -> Iterator[str]:
        model = self.model
        mixers = {mixer for layer in model.layers for mixer in layer.mixers}
        windows = sorted({m.window for m in mixers if isinstance(m, Attention) and m.window})
        tops = sorted({m.indexer.top for m in mixers if isinstance(m, LatentAttention) and m.indexer})
        for window in windows + tops:
            if any(
                np.any(sums.windowed_positions(window, Bound.LEAST) != sums.windowed_positions(window, Bound.MOST))
                for sums in (self.batch.prefill, self.batch.decode)
            ):
                taken = {"expected": "the value for requests that are alike", "least": "the least", "most": "the most"}
                yield f"sums do not tell how much a window of {window} tokens covers: {taken[self.bound]} is taken."
        blocks = [layer.feed_forward for layer in model.layers if isinstance(layer.feed_forward, Experts)]
        recorded = self.batch.distinct_experts
        if blocks and (recorded is None or np.any(np.isnan(recorded))):
            taken = {
                "expected": "that of evenly spread, independent choices, the most on average,",
                "least": "the least possible",
                "most": "the most possible",
            }
            where = "" if recorded is None else f" of {float(np.mean(np.isnan(recorded))):.1%} of the steps"
            yield f"which experts the tokens chose is not recorded{where}: {taken[self.bound]} is taken."
        if blocks and (self.ranks.expert > 1 or self.ranks.data > 1):
            yield "experts of all ranks are taken to get equally many tokens, data-parallel ranks to have steps alike."
        if any(isinstance(mixer, Recurrent) for mixer in mixers):
            yield "recurrences are counted token by token: kernels that work in chunks do more operations."
        yield from model.not_understood


def index_bytes(indexer: Indexer) -> float:
    """Bytes of a token in the indexer's own cache, as vLLM keeps it: fp8 with a 32-bit scale for 128 numbers."""
    return indexer.dim + 4.0 * -(-indexer.dim // 128)


def _blocks(layers: Counter[Layer]) -> Counter[Experts]:
    found: Counter[Experts] = Counter()
    for layer, count in layers.items():
        if isinstance(layer.feed_forward, Experts):
            found[layer.feed_forward] += count
    return found
