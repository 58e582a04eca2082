"""The Lorsa module and the attention layer that it replaces."""
