"""What surrounds training: checkpoints, loggers, profiling, devices, console, sweeps."""
