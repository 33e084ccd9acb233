"""The state of any module: listed, copied, put back, compared; and checkpoints that preserve it."""
