"""What the seven stages share: blocks, noise schedule, data, training, sampling, checkpoints, commands."""
