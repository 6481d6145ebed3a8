"""Programs by the names that other projects give them."""
