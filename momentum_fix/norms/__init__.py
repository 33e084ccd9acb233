"""Running statistics of norm layers: which layers those are, their momenta, and forwards that update them once."""
