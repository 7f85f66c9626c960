"""The ops as Triton kernels. Nothing here is imported before a tensor on a GPU asks for it: see launch.py."""
