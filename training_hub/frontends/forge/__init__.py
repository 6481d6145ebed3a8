"""torchforge's SFT app as a dialect: its YAML, with the names and defaults of torchtitan 0.2, said in one recipe."""
