"""A run to watch: a tiny base model, instructions made on the spot, and a score that is exact.

`python -m training_hub.demo` fine-tunes; `python -m training_hub.demo.base` pre-trains the base model again.
"""
