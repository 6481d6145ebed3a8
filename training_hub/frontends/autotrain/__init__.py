"""The names and defaults of AutoTrain's SFT guide, for Python, flags and YAML."""
