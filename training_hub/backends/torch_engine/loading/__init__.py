"""From a model folder to a model on a device: whole or divided, as it is or in few bits."""
