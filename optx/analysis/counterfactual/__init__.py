"""What would have to differ for another decision, and whether that outlives the model."""
