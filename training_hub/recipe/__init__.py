"""What one run is: plain frozen data that YAML, flags and keywords all turn into."""

from training_hub.recipe.recipe import Recipe

__all__ = ["Recipe"]
