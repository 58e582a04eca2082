"""How well dictionaries stand in for what they replace."""
