"""What a model takes on many devices, on paper: formulas, layouts, and which layout to take."""
