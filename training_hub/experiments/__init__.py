"""Several runs that belong together, and what they say as one."""
