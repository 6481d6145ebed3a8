"""Optimizers of our own: the same steps as torch's, with less memory for what they keep."""
