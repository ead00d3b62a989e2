"""The Trainer callback, and what is peculiar to the Trainer."""
