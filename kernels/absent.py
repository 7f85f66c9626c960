"""Stands for the native kernels (_C) where they were not built."""

import logging


def said(error: ImportError) -> None:
    """One line in the log."""
    logging.getLogger(__name__).warning(
        "the native kernels are not built (%s): plain torch computes instead, slowly. Install a C++ compiler and "
        "install remanence again, or install a wheel",
        error,
    )


def isa() -> str:
    return "none"


def available_isas() -> list[str]:
    return []


def set_isa(name: str) -> None:
    raise ValueError(f"isa: '{name}' cannot be had, as the native kernels are not built")
