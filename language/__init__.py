"""Language models: found, loaded, captured, understood and edited."""
