"""Low-Rank Sparse Attention."""
