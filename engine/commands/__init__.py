"""One file a command: its flags in `configure`, what it does in `run`, which imports late."""
