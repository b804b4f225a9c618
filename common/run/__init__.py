"""What runs the lesson: command line, checkpoints, run folder, pictures, and the machine's devices and processes."""
