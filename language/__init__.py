"""Language models: found, loaded, captured, understood, edited."""
