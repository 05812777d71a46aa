"""``soap race``: one model trained with several optimizers, from the same start on the same batches."""
