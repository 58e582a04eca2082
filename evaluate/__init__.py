"""Quality of dictionaries: on stored activations, and inside the language model."""
