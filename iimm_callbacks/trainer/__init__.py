"""The Trainer callback, and what only the Trainer has."""
