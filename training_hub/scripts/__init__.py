"""Scripts that are run as modules, where the packages that they come from have them."""
