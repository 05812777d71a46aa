"""The command line ``soap``: optimizers raced against each other on the same model, start and batches.

Needs the extra: ``pip install ".[lab]"`` in a clone. This room uses the library only through its public names.
"""
