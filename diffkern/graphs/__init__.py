"""What runs alike again and again, recorded: on a GPU in CUDA graphs, on a CPU as the calls of its kernels."""
