"""What runs alike again and again, recorded in CUDA graphs."""
