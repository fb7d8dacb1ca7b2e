"""What a model's attention costs and what it does to its predictions."""
