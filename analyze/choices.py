"""Scores of heads and what heads can be sorted by; imports nothing heavy."""

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
PROBE_SCORES = tuple(f"probe_{name}" for name in STORE_SCORES)
"""The same on random tokens that are repeated once, where no match is by chance."""
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
