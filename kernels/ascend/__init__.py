"""Packed layers on Ascend NPUs, by torch-npu's own operators: what each may be given (routes.py), the layouts that they
read (weights.py), the products (products.py), and their schemas (schemas.py)."""
