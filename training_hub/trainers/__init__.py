"""AutoTrain's paths: what its guide imports from `autotrain.trainers` is here under `training_hub.trainers`."""
