"""A training step observed: what recomputations give autograd, which state they move, and what to do about it."""
