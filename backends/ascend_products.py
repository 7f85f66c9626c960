"""Which Ascend products there are, by the name of their chip, and what torch-npu's operators take on each.

From the operators' documentation (op-plugin, docs/zh/custom_APIs) and CANN's platform files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """series    as the operators' documentation groups them
    chips        pattern of torch.npu.get_device_name
    bfloat16     tensors in bfloat16
    int4         weights and inputs of 4 bits, eight in an int32
    per_token    npu_dynamic_quant, and a scale per row in npu_quant_matmul
    fused        npu_rotate_quant, npu_kronecker_quant
    sums         npu_quant_matmul gives exact int32
    """

    name: str
    series: str
    chips: str
    bfloat16: bool = True
    int4: bool = True
    per_token: bool = True
    fused: bool = True
    sums: bool = True


PRODUCTS = {
    product.name: product
    for product in (
        *(Product(f"910B{i}", "Atlas A2", rf"Ascend910B{i}(C|-1)?") for i in range(1, 5)),
        Product("910C", "Atlas A3", r"Ascend910_93\d\d"),
        Product(
            "310P", "Atlas 310P", r"Ascend310P\d?", bfloat16=False, int4=False, per_token=False, fused=False, sums=False
        ),
    )
}


def product_named(name: str) -> Product:
    """By its name here, or that of its chip ("910B4", "Ascend910B4", "310P3"); ValueError for another."""
    chip = name if name.startswith("Ascend") else f"Ascend{name}"
    for product in PRODUCTS.values():
        if name == product.name or re.fullmatch(product.chips, chip):
            return product
    raise ValueError(f"product: {name!r} is not one of {', '.join(PRODUCTS)}")
