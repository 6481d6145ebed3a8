"""EasyDeL's fine-tuning scripts."""
