"""What `optx.kernels.device_check` runs on a GPU."""
