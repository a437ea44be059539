"""The families of fused diffusers schedulers."""
