"""`SFTConfig` and `SFTTrainer` as users of EasyDeL and of TRL know them: tables from their names to the recipe."""
