"""Scores of heads, what is needed to trust them, and what heads can be sorted by."""

LEAST_FIRED = 20
"""Firings below which a share means little."""
LABEL_FROM = 0.5
"""Share from which on a head is called by a type."""

STORE_SCORES = (
    "previous_token",
    "same_token",
    "duplicate_token",
    "induction",
    "first_token",
    "local",
    "long_range",
)
"""Columns of heads.parquet: what share of its reading is of a type, in the stored text."""
KINDS = (*STORE_SCORES, "successor")
"""Kinds of heads that can be looked for."""
N_SINGLE = 5
"""Number of STORE_SCORES, from the first, that do not hold another."""
PROBE_SCORES = tuple(f"probe_{name}" for name in STORE_SCORES)
"""The same on random tokens that are repeated once, where no match is by chance."""
LOWER = {name: f"{name}_low" for name in (*STORE_SCORES, *PROBE_SCORES, "successor")}
"""Columns with the lower bounds of scores."""
BY = ("both", "text", "probes", "disputed")
"""What a head has its type by: text and probes; one of them, as the other cannot tell; or by the
text though the probes say otherwise."""
SORTABLE = (
    "head",
    "qk_head",
    "n_fired",
    "frequency",
    "mean_act",
    "max_act",
    "norm_o",
    "norm_v",
    "distance",
    "entropy",
    *STORE_SCORES,
    "probe_fired",
    *PROBE_SCORES,
    "successor",
)
"""Columns of heads.parquet that are numbers."""
