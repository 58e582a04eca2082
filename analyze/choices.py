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
LIST_BAR = 4.25
"""The z of a list from which on its tokens are said of a head: by chance, one layer of 4,600 heads
in twenty has such a list."""
TOKEN_BAR = 3.5
"""The z of a token of such a list from which on it is said: chance gives it to 2 of 10,000."""
BAR = 6.5
"""The z from which on a token that is read, or a like head, is said of a head: chance gives it to 4
of 1e11, and a layer has some 1e8 of such claims."""
