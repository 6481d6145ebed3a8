"""A run as actors with a lifecycle: in processes of our own, or on Monarch."""
