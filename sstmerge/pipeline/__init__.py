"""The jobs of a user: merge, collect, evaluate, check, draw; the only layer that loads models."""
