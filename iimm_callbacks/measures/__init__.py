"""Embeddings and labels -> IIMM, zero-shot accuracy, linear probe; pure functions of tensors."""
