"""The ways to call us, each a dialect of the one recipe: functions, the registry, the command line."""
