"""Saved checkpoints: read as untrusted data, without torch, and what the counters in them tell.

Nothing in here imports torch, or what this package knows of models. `momentum_fix.auditing` reads models.
"""
