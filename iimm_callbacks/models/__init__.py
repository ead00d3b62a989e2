"""What is fine-tuned: encoders of each family, methods, what training puts around a model."""
