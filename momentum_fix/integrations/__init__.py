"""Callbacks for trainers, so that `update_once` is on while they train, and off afterwards.

    momentum_fix.integrations.lightning.UpdateOnce()       Trainer(callbacks=[UpdateOnce()]), also pytorch_lightning's
    momentum_fix.integrations.transformers.UpdateOnce()    Trainer(..., callbacks=[UpdateOnce()])

Importing `momentum_fix` loads neither library; each module loads its own.
"""
