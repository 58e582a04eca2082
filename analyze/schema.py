"""Files of an analysis: four Parquet tables and a page of facts.

    analysis/
      heads.parquet       a row per OV head, those that never fired included
      examples.parquet    where heads fired, and from where they read; sorted by head
      sequences.parquet   the token ids of the sequences that examples lie in
      tokens.parquet      the text of every token id that any of the others names
      seal.json           sizes and checksums of these tables and of analysis.json
      analysis.json       facts of the analysis; written last, so a folder with it is whole

A column that takes the language model is null if that was not given.
"""

import pyarrow as pa

from .choices import LOWER, PROBE_SCORES, STORE_SCORES

VERSION = 2
READABLE = (1, 2)
"""Versions that can be read. In 1 no score has a bound, types are by shares in text alone,
and what is listed has no z."""
FACTS_FILE = "analysis.json"
PARTIAL_FILE = "partial.safetensors"
"""File of what was collected while the analysis is not finished."""

TYPES = ("previous_token", "induction", "duplicate_token", "first_token", "same_token", "local",
         "long_range", "mixed", "rare", "silent")  # fmt: skip
"""Values of heads.parquet's `type`."""


LISTED = ("promoted", "suppressed", "reads_embedding", "reads", "similar_o", "similar_v")
"""Columns of heads.parquet that list tokens or heads; a column of z belongs to each."""
TESTED_AS_LISTS = ("promoted", "suppressed", "reads_embedding")
"""Those of which the whole list has a z, too: as many tokens compete as there are."""


def _rows(name: str, value: str) -> pa.DataType:
    return pa.list_(pa.struct([(name, pa.int32()), (value, pa.float32())]))


HEADS = pa.schema(
    [
        ("head", pa.int32()),  # of n_ov_heads; the row number too
        ("qk_head", pa.int32()),  # whose attention pattern it has
        ("type", pa.dictionary(pa.int8(), pa.string())),  # one of TYPES
        ("type_by", pa.dictionary(pa.int8(), pa.string())),  # one of BY; null of one of no type
        ("n_fired", pa.int64()),  # tokens on which it fired
        ("frequency", pa.float64()),  # their share of all
        ("mean_act", pa.float32()),  # mean of its activation z where it fired; null if it never did
        ("max_act", pa.float32()),  # of the largest |z|, with its sign
        ("act_quantiles", pa.list_(pa.float32())),  # of |z| where it fired, at QUANTILES; estimated
        ("norm_o", pa.float32()),  # ||w_O||: an activation z writes a vector of norm |z| ||w_O||
        ("norm_v", pa.float32()),  # ||w_V||
        ("distance", pa.float32()),  # mean of t - s over what it reads, in tokens
        ("entropy", pa.float32()),  # of what it reads, in nats; 0 is a single source
        ("by_distance", pa.list_(pa.float32())),  # share read in each of DISTANCES; sums to 1
        *((name, pa.float32()) for name in STORE_SCORES),
        ("probe_fired", pa.int64()),  # tokens of the probe on which it fired
        *((name, pa.float32()) for name in PROBE_SCORES),
        ("successor", pa.float32()),  # share of ordinal words it reads whose successor it promotes
        ("successor_words", pa.int32()),  # ordinal words that it reads
        ("successor_chance", pa.float32()),  # score that chance gives for these words
        *((low, pa.float32()) for low in LOWER.values()),  # lower bounds of the scores, 95 %
        (
            "parents",  # heads of the original layer, the likeliest first
            pa.list_(
                pa.struct(
                    [
                        ("head", pa.int32()),
                        ("ov", pa.float32()),  # how far w_V and w_O lie in its value space, 0..1
                        ("qk", pa.float32()),  # cosine of the bilinear forms W_Q W_K^T
                        ("pattern", pa.float32()),  # overlap of attention patterns on text, 0..1
                    ]
                )
            ),
        ),
        ("promoted", _rows("token", "logit")),  # by its mean activation, the most promoted first
        ("suppressed", _rows("token", "logit")),  # the most suppressed first
        ("reads_embedding", _rows("token", "value")),  # embeddings w_V reads most, after the norm
        ("reads", _rows("token", "share")),  # source tokens of its examples
        ("similar_o", _rows("head", "cosine")),  # nearest heads by w_O
        ("similar_v", _rows("head", "cosine")),  # nearest heads by w_V
        # standard deviations by which what is listed goes beyond chance, and by which a list does
        *((f"{name}_z", pa.list_(pa.float32())) for name in LISTED),
        *((f"{name}_list_z", pa.float32()) for name in TESTED_AS_LISTS),
    ]
)  # fmt: skip
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
DISTANCES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Lower edges of the buckets of `by_distance`: 0 is the token itself, the last is open."""

EXAMPLES = pa.schema(
    [
        ("head", pa.int32()),
        ("kind", pa.dictionary(pa.int8(), pa.string())),  # "top", or "sample" of all its firings
        ("rank", pa.int32()),  # within head and kind, from 0, the largest |act| first
        ("quantile", pa.float32()),  # share of its firings with a smaller |act|; 1 of "top"
        ("act", pa.float32()),  # z
        ("seq", pa.int64()),  # sequence of the store
        ("position", pa.int32()),  # of the token on which it fired, in the sequence
        ("token", pa.int32()),  # its id
        ("document", pa.dictionary(pa.int32(), pa.string())),  # name of the token's document
        ("sources", pa.list_(pa.int32())),  # positions it read from, the largest |P v| first
        ("source_acts", pa.list_(pa.float32())),  # P[t, s] v[s] of each
        ("rest", pa.float32()),  # of all others; act = sum(source_acts) + rest
    ]
)
SEQUENCES = pa.schema([("seq", pa.int64()), ("tokens", pa.list_(pa.int32()))])
TOKENS = pa.schema([("token", pa.int32()), ("text", pa.string())])  # null: no tokenizer at hand

TABLES = {"heads": HEADS, "examples": EXAMPLES, "sequences": SEQUENCES, "tokens": TOKENS}
KNOWN = {
    "heads": ("head", "type", "n_fired", "frequency"),
    "examples": ("head", "kind", "rank", "act", "seq", "position", "sources", "source_acts"),
    "sequences": ("seq", "tokens"),
    "tokens": ("token",),
}
"""Columns of each table that are never null."""


def require_whole(table: pa.Table, name: str) -> None:
    """Raise ValueError where a column of KNOWN has a null."""
    for column in KNOWN[name]:
        if table[column].null_count:
            raise ValueError(f"{column} is null in {table[column].null_count:,} rows")
