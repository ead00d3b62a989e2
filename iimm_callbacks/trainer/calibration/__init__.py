"""A new model -> a forecast one can act on: a few guarded fine-tunes, planned and saved."""
