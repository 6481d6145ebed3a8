"""What a run writes: checkpoints of its steps, and the final model."""
